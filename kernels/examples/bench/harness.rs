//! Cases of the benchmark, and how they are run.

use marimba_kernels::{
    Args, Command, DType, Device, Launch, Module, Prepared, Product, Recorder, Target, Tensor,
};
use std::borrow::Cow;
use std::error::Error;
use std::path::Path;

/// Largest relative error (2-norm) of bf16 against f32 that counts as right.
const RIGHT: f64 = 2e-2;

/// Bytes that the sets of inputs should hold together, so that a cache does not keep one from run to run.
const ROTATED: usize = 400 << 20;

/// A tensor of a case.
#[derive(Clone, Copy)]
pub(crate) struct Id(usize);

enum Fill {
    /// Normal deviates times a scale, plus a shift, rounded to bf16.
    Noise(f32, f32),
    /// Integers.
    Ints(Vec<i32>),
    /// One number everywhere.
    Value(f32),
    /// NaN: written by a stage.
    Poison,
}

struct Spec {
    dims: Vec<usize>,
    /// `None`: the type under test.
    dtype: Option<DType>,
    fill: Fill,
}

type Launcher = Box<dyn Fn(&mut Recorder, &Args)>;

struct Stage {
    name: &'static str,
    flops: f64,
    bytes: f64,
    args: Vec<Option<Id>>,
    results: Vec<Id>,
    launch: Launcher,
}

/// Tensors and the ops that run over them one after the other.
#[derive(Default)]
pub(crate) struct Graph {
    tensors: Vec<Spec>,
    stages: Vec<Stage>,
    totals: Vec<(&'static str, usize)>,
}

impl Graph {
    /// Asks for one more row: the sum of all stages so far.
    pub(crate) fn total(&mut self, name: &'static str) {
        self.totals.push((name, self.stages.len()));
    }

    fn tensor(&mut self, dims: &[usize], dtype: Option<DType>, fill: Fill) -> Id {
        self.tensors.push(Spec {
            dims: dims.to_vec(),
            dtype,
            fill,
        });
        Id(self.tensors.len() - 1)
    }

    /// An input in the type under test.
    pub(crate) fn noise(&mut self, dims: &[usize], scale: f32) -> Id {
        self.tensor(dims, None, Fill::Noise(scale, 0.0))
    }

    /// An f32 input.
    pub(crate) fn single(&mut self, dims: &[usize], scale: f32, shift: f32) -> Id {
        self.tensor(dims, Some(DType::F32), Fill::Noise(scale, shift))
    }

    /// An f32 input of one number everywhere.
    pub(crate) fn value(&mut self, dims: &[usize], value: f32) -> Id {
        self.tensor(dims, Some(DType::F32), Fill::Value(value))
    }

    /// Integers.
    pub(crate) fn ints(&mut self, dims: &[usize], values: Vec<i32>) -> Id {
        self.tensor(dims, Some(DType::I32), Fill::Ints(values))
    }

    /// A result in the type under test.
    pub(crate) fn result(&mut self, dims: &[usize]) -> Id {
        self.tensor(dims, None, Fill::Poison)
    }

    /// A result of a type of its own.
    pub(crate) fn result_of(&mut self, dims: &[usize], dtype: DType) -> Id {
        self.tensor(dims, Some(dtype), Fill::Poison)
    }

    /// An op, with its operations and the fewest bytes it must move.
    pub(crate) fn stage(
        &mut self,
        name: &'static str,
        (flops, bytes): (f64, f64),
        args: &[Option<Id>],
        results: &[Id],
        launch: impl Fn(&mut Recorder, &Args) + 'static,
    ) {
        self.stages.push(Stage {
            name,
            flops,
            bytes,
            args: args.to_vec(),
            results: results.to_vec(),
            launch: Box::new(launch),
        });
    }
}

/// A graph that is timed and a smaller one of the same ops that is checked.
pub(crate) struct Case {
    /// Op and shape.
    pub(crate) name: String,
    /// What is timed.
    pub(crate) timed: Graph,
    /// What is checked; several shapes.
    pub(crate) checked: Vec<Graph>,
}

struct Row {
    case: String,
    stage: String,
    median: f64,
    least: f64,
    most: f64,
    runs: usize,
    flops: f64,
    bytes: f64,
    error: f64,
}

struct Variant {
    stem: String,
    name: String,
    text: String,
}

/// Ceilings, variants and what was measured.
pub(crate) struct Run {
    device: Device,
    target: Target,
    seconds: f64,
    copy: f64,
    product: f64,
    exponentials: f64,
    variants: Vec<Variant>,
    rows: Vec<Row>,
    wrong: usize,
}

const FILLER: &str = r#"
__device__ u32 mix(u32 x) { x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; return x ^ x >> 16; }
KERNEL noise(TR0* y, i64 n, int seed, float scale, float shift) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        u32 a = mix((u32)e * 2654435761u ^ mix((u32)seed + (u32)(e >> 32))), b = mix(a ^ 0x9e3779b9u);
        float u = ((a >> 8) + 0.5f) / 16777216.f, v = (b >> 8) / 16777216.f;
        bf16 r;
        st(&r, 0, scale * sqrtf(-2.f * logf(u)) * cospif(2.f * v) + shift);
        st(y, e, widen(r));
    }
}
KERNEL value(TR0* y, i64 n, float v) { for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, v); }
KERNEL faulty(const TA0* y, i64 n, int* count) {
    int c = 0;
    for (i64 e = global_thread(); e < n; e += all_threads()) c += !(fabsf(ld(y, e)) < 1e30f);
    if (c) atomicAdd(count, c);
}
KERNEL exponentials(float* y, int n) {
    float a[8];
    for (int j = 0; j < 8; j++) a[j] = -0.001f * (threadIdx.x + j);
    for (int i = 0; i < n; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a[j]));
    float s = 0;
    for (int j = 0; j < 8; j++) s += a[j];
    if (s == 1.2345f) y[0] = s;
}
"#;

fn own(
    function: &'static str,
    dtype: DType,
    grid: usize,
    params: Vec<marimba_kernels::Param>,
) -> Command {
    let defines = match dtype {
        DType::Bf16 => vec![
            ("TR0".to_string(), "bf16".to_string()),
            ("TA0".to_string(), "bf16".to_string()),
        ],
        _ => Vec::new(),
    };
    Command::Launch(Launch {
        module: Module {
            stem: "bench",
            source: Cow::Borrowed(FILLER),
            defines,
        },
        function,
        grid: [grid, 1, 1],
        block: 256,
        shared: 0,
        params,
        early: false,
    })
}

/// Memory of one set of a graph's tensors.
struct Memory {
    tensors: Vec<Tensor>,
}

/// A stage of one set, ready to run.
type Ready = Vec<(Prepared, usize)>;

impl Run {
    /// Opens the device and measures its ceilings.
    pub(crate) fn new(
        seconds: f64,
        sources: Option<&Path>,
        target: &str,
    ) -> Result<Self, Box<dyn Error>> {
        let device = Device::open(0)?;
        let target = match target {
            "device" => device.target(),
            "fixed" => Target {
                deterministic: true,
                ..device.target()
            },
            "any" => Target::default(),
            _ => return Err(format!("no target {target}; there are device, fixed and any").into()),
        };
        let mut run = Run {
            device,
            target,
            seconds,
            copy: 0.0,
            product: 0.0,
            exponentials: 0.0,
            variants: Vec::new(),
            rows: Vec::new(),
            wrong: 0,
        };
        if let Some(folder) = sources {
            for entry in std::fs::read_dir(folder)? {
                let path = entry?.path();
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                if let Some((stem, name)) = stem.split_once('@') {
                    run.variants.push(Variant {
                        stem: stem.to_string(),
                        name: name.to_string(),
                        text: std::fs::read_to_string(&path)?,
                    });
                }
            }
            run.variants.sort_by(|a, b| a.name.cmp(&b.name));
        }
        run.ceilings()?;
        Ok(run)
    }

    fn once(&mut self, commands: &[Command]) -> Result<(), Box<dyn Error>> {
        let prepared = self.device.prepare(commands, |_| {})?;
        // SAFETY: all commands here are over memory allocated for them.
        unsafe { self.device.run(&prepared, 0..commands.len())? };
        self.device.sync()?;
        Ok(())
    }

    /// Milliseconds of each of many runs over the sets in turn.
    fn times(&self, sets: &[&(Prepared, usize)]) -> Result<Vec<f64>, Box<dyn Error>> {
        let mut out = Vec::new();
        let mut spent = 0.0;
        let mut i = 0;
        while i < 3 + sets.len() || (spent < self.seconds * 1e3 && i < 300) {
            let (prepared, n) = sets[i % sets.len()];
            // SAFETY: as in `once`.
            let ms =
                unsafe { self.device.time(prepared, std::slice::from_ref(&(0..*n)))? }[0] * 1e3;
            if i >= 2 {
                out.push(ms);
                spent += ms;
            }
            i += 1;
        }
        Ok(out)
    }

    fn ceilings(&mut self) -> Result<(), Box<dyn Error>> {
        let bytes = 2usize << 30;
        let (a, b, n) = (
            self.device.allocate(bytes)?,
            self.device.allocate(bytes)?,
            8192usize,
        );
        let long = |x: usize| marimba_kernels::Param::Long(x as i64);
        let fill = |ptr: u64, seed: i32| {
            own(
                "noise",
                DType::Bf16,
                4096,
                vec![
                    marimba_kernels::Param::Ptr(ptr),
                    long(bytes / 2),
                    marimba_kernels::Param::Int(seed),
                    marimba_kernels::Param::Float(1.0),
                    marimba_kernels::Param::Float(0.0),
                ],
            )
        };
        self.once(&[fill(a, 1), fill(b, 2)])?;
        let side = (n * n * 2) as u64;
        let (rounds, blocks) = (4096usize, 132 * 8);
        let mut best = [f64::MAX; 3];
        let tries = [
            Command::Copy {
                to: b,
                from: a,
                bytes,
            },
            Command::Product(Product {
                beta_at: 0,
                add: 0,
                a,
                b: a + side,
                c: b,
                transposed: (false, true),
                sizes: (n, n, n),
                input: DType::Bf16,
                eights: None,
                output: DType::Bf16,
                alpha: 1.0,
                beta: 0.0,
            }),
            own(
                "exponentials",
                DType::F32,
                blocks,
                vec![
                    marimba_kernels::Param::Ptr(b),
                    marimba_kernels::Param::Int(rounds as i32),
                ],
            ),
        ];
        for (i, command) in tries.into_iter().enumerate() {
            let prepared = (self.device.prepare(&[command], |_| {})?, 1);
            best[i] = median(&mut self.times(&[&prepared])?);
        }
        self.copy = 2.0 * bytes as f64 / best[0] / 1e9;
        self.product = 2.0 * (n as f64).powi(3) / best[1] / 1e9;
        self.exponentials = (blocks * 256 * 8 * rounds) as f64 / best[2] / 1e9;
        // SAFETY: `times` waited for the runs.
        unsafe {
            self.device.free(a);
            self.device.free(b);
        }
        println!(
            "{}: copy {:.2} TB/s (read + written), bf16 product 8192^3 {:.0} TFLOP/s, exponentials {:.2} T/s",
            self.device.name(),
            self.copy,
            self.product,
            self.exponentials
        );
        Ok(())
    }

    fn memory(&mut self, graph: &Graph, dtype: DType, seed: i32) -> Result<Memory, Box<dyn Error>> {
        use marimba_kernels::Param::{Float, Int, Long, Ptr};
        let mut tensors = Vec::new();
        for (i, spec) in graph.tensors.iter().enumerate() {
            let t = Tensor {
                ptr: 0,
                dtype: spec.dtype.unwrap_or(dtype),
                dims: spec.dims.clone(),
            };
            let ptr = self.device.allocate(t.bytes().max(256))?;
            let (p, n) = (Ptr(ptr), Long(t.len() as i64));
            match &spec.fill {
                Fill::Noise(scale, shift) => {
                    let params = vec![
                        p,
                        n,
                        Int(seed * 1000 + i as i32),
                        Float(*scale),
                        Float(*shift),
                    ];
                    self.once(&[own("noise", t.dtype, 4096, params)])?;
                }
                Fill::Value(v) => {
                    self.once(&[own("value", t.dtype, 4096, vec![p, n, Float(*v)])])?
                }
                // SAFETY: allocated above with that many bytes.
                Fill::Ints(v) => unsafe {
                    let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_ne_bytes()).collect();
                    self.device.write(ptr, &bytes)?;
                },
                // SAFETY: as above.
                Fill::Poison => unsafe { self.device.fill(ptr, 0xff, t.bytes())? },
            }
            tensors.push(Tensor { ptr, ..t });
        }
        Ok(Memory { tensors })
    }

    fn forget(&self, memory: Memory) {
        for t in memory.tensors {
            // SAFETY: allocated by `memory`; freeing waits for the work.
            unsafe { self.device.free(t.ptr) };
        }
    }

    fn record(&self, stage: &Stage, m: &Memory, r: &mut Recorder) {
        let args: Vec<Option<Tensor>> = stage
            .args
            .iter()
            .map(|id| id.map(|id| m.tensors[id.0].clone()))
            .collect();
        let results: Vec<Tensor> = stage
            .results
            .iter()
            .map(|id| m.tensors[id.0].clone())
            .collect();
        r.next_op();
        (stage.launch)(
            r,
            &Args {
                args: &args,
                results: &results,
                fixed: &[],
            },
        );
    }

    fn scratch(&self, graph: &Graph, m: &Memory) -> usize {
        let mut r = Recorder::new(256).on(self.target);
        for stage in &graph.stages {
            self.record(stage, m, &mut r);
        }
        r.scratch_bytes()
    }

    /// Prints the time of each command of a stage that has several, run one after the other.
    fn commands(
        &self,
        stage: &Stage,
        m: &Memory,
        (prepared, n): &(Prepared, usize),
    ) -> Result<(), Box<dyn Error>> {
        let ranges: Vec<_> = (0..*n).map(|i| i..i + 1).collect();
        let mut times = vec![Vec::new(); *n];
        for _ in 0..7 {
            // SAFETY: as in `once`.
            for (t, secs) in times
                .iter_mut()
                .zip(unsafe { self.device.time(prepared, &ranges)? })
            {
                t.push(secs * 1e3);
            }
        }
        let mut r = Recorder::new(256).on(self.device.target());
        self.record(stage, m, &mut r);
        for (command, t) in r.commands.iter().zip(&mut times) {
            let name = match command {
                Command::Launch(l) => l.function,
                Command::Product(_) => "product",
                Command::Zero { .. } => "zero",
                Command::Copy { .. } => "copy",
            };
            println!("    {:12} {name:20} {:8.3} ms", stage.name, median(t));
        }
        Ok(())
    }

    fn ready(
        &mut self,
        graph: &Graph,
        m: &Memory,
        scratch: u64,
        variant: Option<usize>,
    ) -> Result<Ready, Box<dyn Error>> {
        let mut out = Vec::new();
        for stage in &graph.stages {
            let mut r = Recorder::new(scratch).on(self.target);
            self.record(stage, m, &mut r);
            let mut commands = r.commands;
            if let Some(v) = variant {
                let v = &self.variants[v];
                for c in &mut commands {
                    if let Command::Launch(l) = c
                        && l.module.stem == v.stem
                    {
                        change(l, &v.text)?;
                    }
                }
            }
            out.push((self.device.prepare(&commands, |_| {})?, commands.len()));
        }
        Ok(out)
    }

    /// Results of each stage.
    fn results(
        &mut self,
        graph: &Graph,
        dtype: DType,
        variant: Option<usize>,
    ) -> Result<Vec<Vec<f64>>, Box<dyn Error>> {
        let m = self.memory(graph, dtype, 1)?;
        let bytes = self.scratch(graph, &m).max(256);
        let scratch = self.device.allocate(bytes)?;
        // SAFETY: allocated above.
        unsafe { self.device.fill(scratch, 0xff, bytes)? };
        let ready = self.ready(graph, &m, scratch, variant)?;
        let mut out = Vec::new();
        for (stage, (prepared, n)) in graph.stages.iter().zip(&ready) {
            // SAFETY: over memory allocated above.
            unsafe { self.device.run(prepared, 0..*n)? };
            for id in &stage.results {
                let t = &m.tensors[id.0];
                let mut raw = vec![0; t.bytes()];
                // SAFETY: as above.
                unsafe { self.device.read(t.ptr, &mut raw)? };
                out.push(decode(&raw, t.dtype));
            }
        }
        self.forget(m);
        // SAFETY: reading waited for the work.
        unsafe { self.device.free(scratch) };
        Ok(out)
    }

    /// Largest relative error of a stage's results over the checked shapes.
    fn errors(&mut self, case: &Case, variant: Option<usize>) -> Result<Vec<f64>, Box<dyn Error>> {
        let mut worst = vec![0.0f64; case.timed.stages.len()];
        for graph in &case.checked {
            let want = self.results(graph, DType::F32, None)?;
            let got = self.results(graph, DType::Bf16, variant)?;
            let mut k = 0;
            for (s, stage) in graph.stages.iter().enumerate() {
                for _ in &stage.results {
                    let (mut above, mut below) = (0.0, 0.0);
                    for (g, w) in got[k].iter().zip(&want[k]) {
                        above += (g - w) * (g - w);
                        below += w * w;
                    }
                    let e = (above / below.max(1e-300)).sqrt();
                    worst[s] = if e.is_nan() {
                        f64::INFINITY
                    } else {
                        worst[s].max(e)
                    };
                    k += 1;
                }
            }
        }
        Ok(worst)
    }

    /// Checks and times a case, and its variants.
    pub(crate) fn case(&mut self, case: &Case) -> Result<(), Box<dyn Error>> {
        let stems: Vec<&'static str> = {
            let m = Memory {
                tensors: case
                    .timed
                    .tensors
                    .iter()
                    .map(|s| Tensor {
                        ptr: 256,
                        dtype: s.dtype.unwrap_or(DType::Bf16),
                        dims: s.dims.clone(),
                    })
                    .collect(),
            };
            let mut r = Recorder::new(256).on(self.target);
            for stage in &case.timed.stages {
                self.record(stage, &m, &mut r);
            }
            r.commands
                .iter()
                .filter_map(|c| match c {
                    Command::Launch(l) => Some(l.module.stem),
                    _ => None,
                })
                .collect()
        };
        let mut which = vec![None];
        which.extend(
            (0..self.variants.len())
                .filter(|&v| stems.iter().any(|s| *s == self.variants[v].stem))
                .map(Some),
        );
        for variant in which {
            if let Err(e) = self.measure(case, variant) {
                let name = variant.map_or("", |v| &self.variants[v].name);
                println!("{} {name}: {e}", case.name);
                self.wrong += 1;
                // After a fault of a kernel nothing more runs on this context; a refusal to compile harms nobody.
                self.device.sync()?;
            }
        }
        Ok(())
    }

    fn measure(&mut self, case: &Case, variant: Option<usize>) -> Result<(), Box<dyn Error>> {
        let errors = self.errors(case, variant)?;
        let graph = &case.timed;
        let one: usize = graph
            .tensors
            .iter()
            .map(|s| s.dims.iter().product::<usize>() * s.dtype.unwrap_or(DType::Bf16).bytes())
            .sum();
        let sets = ROTATED.div_ceil(one.max(1)).clamp(2, 8);
        let mut memories = Vec::new();
        for i in 0..sets {
            memories.push(self.memory(graph, DType::Bf16, 10 + i as i32)?);
        }
        let bytes = self.scratch(graph, &memories[0]).max(256);
        let scratch = self.device.allocate(bytes)?;
        let mut ready = Vec::new();
        for m in &memories {
            ready.push(self.ready(graph, m, scratch, variant)?);
        }
        let name = match variant {
            Some(v) => format!("{} @{}", case.name, self.variants[v].name),
            None => case.name.clone(),
        };
        let first = self.rows.len();
        for (s, stage) in graph.stages.iter().enumerate() {
            let runs: Vec<&(Prepared, usize)> = ready.iter().map(|r| &r[s]).collect();
            let mut times = self.times(&runs)?;
            if runs[0].1 > 1 {
                self.commands(stage, &memories[0], runs[0])?;
            }
            let faulty = self.faulty(stage, &memories)?;
            if faulty > 0 {
                println!("{name} {}: {faulty} results are not finite", stage.name);
            }
            let error = if faulty > 0 { f64::INFINITY } else { errors[s] };
            self.wrong += usize::from(error.is_nan() || error > RIGHT);
            self.rows.push(Row {
                case: name.clone(),
                stage: stage.name.to_string(),
                median: median(&mut times),
                least: times[0],
                most: times[times.len() - 1],
                runs: times.len(),
                flops: stage.flops,
                bytes: stage.bytes,
                error,
            });
        }
        for (total, upto) in &graph.totals {
            let sum = |of: fn(&Row) -> f64| self.rows[first..first + upto].iter().map(of).sum();
            let (median, least, most) = (sum(|r| r.median), sum(|r| r.least), sum(|r| r.most));
            let (flops, bytes) = (sum(|r| r.flops), sum(|r| r.bytes));
            self.rows.push(Row {
                case: name.clone(),
                stage: (*total).to_string(),
                median,
                least,
                most,
                runs: 0,
                flops,
                bytes,
                error: self.rows[first..first + upto]
                    .iter()
                    .fold(0.0, |m, r| m.max(r.error)),
            });
        }
        for row in &self.rows[first..] {
            self.print(row);
        }
        println!(
            "    scratch {:.1} MB, {sets} sets of {:.1} MB",
            bytes as f64 / 1e6,
            one as f64 / 1e6
        );
        for m in memories {
            self.forget(m);
        }
        // SAFETY: `times` waited for the runs.
        unsafe { self.device.free(scratch) };
        Ok(())
    }

    /// How many of a stage's results are NaN or infinite, over all sets.
    fn faulty(&mut self, stage: &Stage, memories: &[Memory]) -> Result<i32, Box<dyn Error>> {
        use marimba_kernels::Param::{Long, Ptr};
        let count = self.device.allocate(4)?;
        for m in memories {
            for id in &stage.results {
                let t = &m.tensors[id.0];
                if t.dtype != DType::I32 {
                    let params = vec![Ptr(t.ptr), Long(t.len() as i64), Ptr(count)];
                    self.once(&[own("faulty", t.dtype, 4096, params)])?;
                }
            }
        }
        let mut raw = [0; 4];
        // SAFETY: allocated above.
        unsafe {
            self.device.read(count, &mut raw)?;
            self.device.free(count);
        }
        Ok(i32::from_ne_bytes(raw))
    }

    fn floor(&self, row: &Row) -> f64 {
        (row.flops / self.product).max(row.bytes / self.copy) / 1e9
    }

    fn print(&self, row: &Row) {
        println!(
            "{:44} {:12} {:8.3} ms ({:.3}..{:.3}, {} runs) {:6.1} TFLOP/s {:5.2} TB/s {:4.0}% of {:.3} ms, error {:.1e}",
            row.case,
            row.stage,
            row.median,
            row.least,
            row.most,
            row.runs,
            row.flops / row.median / 1e9,
            row.bytes / row.median / 1e9,
            100.0 * self.floor(row) / row.median,
            self.floor(row),
            row.error,
        );
    }

    /// Prints all rows once more, together.
    pub(crate) fn table(&self) {
        println!(
            "-- all, in the order they ran (floor: the larger of operations and bytes over the ceilings above)"
        );
        for row in &self.rows {
            self.print(row);
        }
    }

    /// How many results were wrong.
    pub(crate) fn failed(&self) -> usize {
        self.wrong
    }

    /// Ceilings and rows.
    pub(crate) fn json(&self) -> String {
        let rows: Vec<String> = self
            .rows
            .iter()
            .map(|r| {
                format!(
                    "{{\"case\":{:?},\"stage\":{:?},\"median_ms\":{},\"least_ms\":{},\"most_ms\":{},\"runs\":{},\"flops\":{},\"bytes\":{},\"floor_ms\":{},\"error\":\"{:e}\"}}",
                    r.case, r.stage, r.median, r.least, r.most, r.runs, r.flops, r.bytes, self.floor(r), r.error
                )
            })
            .collect();
        format!(
            "{{\"device\":{:?},\"copy_tb_s\":{},\"product_tflop_s\":{},\"exponentials_t_s\":{},\"rows\":[\n{}\n]}}\n",
            self.device.name(),
            self.copy,
            self.product,
            self.exponentials,
            rows.join(",\n")
        )
    }
}

/// Puts a variant in the place of a launch's source.
fn change(l: &mut Launch, text: &str) -> Result<(), Box<dyn Error>> {
    l.module.source = Cow::Owned(text.to_string());
    for line in text.lines().filter_map(|l| l.strip_prefix("//!")) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("define"), Some(name)) => {
                let value = words.next().unwrap_or("1").to_string();
                l.module.defines.retain(|(n, _)| n != name);
                l.module.defines.push((name.to_string(), value));
            }
            (Some("launch"), Some(function)) if function == l.function => {
                for word in words {
                    let (key, value) = word.split_once('=').ok_or("key=value is wanted")?;
                    match key {
                        "block" => l.block = value.parse()?,
                        "shared" => l.shared = value.parse()?,
                        "grid" => {
                            for (i, x) in value.split(',').enumerate().take(3) {
                                l.grid[i] = x.parse()?;
                            }
                        }
                        _ => return Err(format!("no key {key}").into()),
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn decode(raw: &[u8], t: DType) -> Vec<f64> {
    let word = |b: &[u8]| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
    match t {
        DType::Bf16 | DType::F16 => raw
            .chunks_exact(2)
            .map(|b| {
                f64::from(f32::from_bits(
                    u32::from(u16::from_ne_bytes([b[0], b[1]])) << 16,
                ))
            })
            .collect(),
        DType::F32 => raw
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_bits(word(b))))
            .collect(),
        DType::I32 => raw
            .chunks_exact(4)
            .map(|b| f64::from(word(b) as i32))
            .collect(),
        DType::Eight(_) => raw.iter().map(|&b| f64::from(b)).collect(),
    }
}
