//! Samples of every op: operations with arguments, drawn from a seed, so that a failure is named by op and seed.
//!
//! Sizes are small and awkward (1, odd, just below a power of two, longer than a chunk); optional arguments come and go; packed rows
//! restart their positions anywhere.

use marimba_backend::HostTensor;
use marimba_backend::dfdx::reference::Arg;
use marimba_ir::op::*;
use marimba_ir::{DType, Dim, Letter, Type, dims};

/// One op with its arguments.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What is run.
    pub op: Op,
    /// By slot.
    pub args: Vec<Option<Arg>>,
    /// Float arguments whose gradient must exist and agree.
    pub grads: Vec<usize>,
    /// Results that carry a cotangent; none: the op is not differentiated.
    pub cotangents: Vec<usize>,
    /// Results that another backend may fill as it likes (saved for its own backward).
    pub private: Vec<usize>,
}

/// Numbers from a seed (xorshift64*, Vigna 2016).
#[derive(Clone, Debug)]
pub struct Gen(u64);

impl Gen {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        let mut g = Gen(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..4).for_each(|_| _ = g.next());
        g
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Heads or tails.
    pub fn flip(&mut self) -> bool {
        self.below(2) == 0
    }

    /// Uniform in [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.next() as f64 / (1u64 << 52) as f64 - 1.0) as f32
    }

    /// Uniform in [-1, 1).
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn arg(&mut self, dims: Vec<Dim>) -> Option<Arg> {
        self.map(dims, |x| x)
    }

    fn map(&mut self, dims: Vec<Dim>, f: impl Fn(f32) -> f32) -> Option<Arg> {
        let ty = Type::f32(dims);
        let data = self.floats(ty.len()).into_iter().map(f).collect();
        Some(Arg {
            ty,
            data: HostTensor::F32(data),
        })
    }

    fn maybe(&mut self, dims: Vec<Dim>) -> Option<Arg> {
        if self.flip() { self.arg(dims) } else { None }
    }

    /// Positions of packed rows: documents start at the row's start or in its middle, and anywhere after.
    fn pos(&mut self, b: usize, t: usize) -> Option<Arg> {
        if self.flip() {
            return None;
        }
        let mut data = Vec::new();
        for _ in 0..b {
            let mut p = self.pick(&[0, 0, 5]);
            for _ in 0..t {
                data.push(p);
                p = if self.below(5) == 0 { 0 } else { p + 1 };
            }
        }
        ints(dims![B b, T t], data)
    }

    fn ids(&mut self, dims: Vec<Dim>, below: usize) -> Option<Arg> {
        let n = dims.iter().map(|d| d.size).product();
        let data = (0..n).map(|_| self.below(below) as i32).collect();
        ints(dims, data)
    }

    fn time(&mut self) -> usize {
        self.pick(&[1, 2, 7, 16, 63])
    }

    /// `[B T .., last]`.
    fn shape(&mut self, last: usize) -> Vec<Dim> {
        let (b, t) = (self.pick(&[1, 2, 3]), self.time());
        dims![B b, T t, D last]
    }
}

fn ints(dims: Vec<Dim>, data: Vec<i32>) -> Option<Arg> {
    Some(Arg {
        ty: Type::new(DType::I32, dims),
        data: HostTensor::I32(data),
    })
}

fn scalar(x: f32) -> Option<Arg> {
    Some(Arg {
        ty: Type::scalar(),
        data: HostTensor::F32(vec![x]),
    })
}

fn sample(
    op: impl Into<Op>,
    args: Vec<Option<Arg>>,
    grads: &[usize],
    cotangents: &[usize],
) -> Sample {
    Sample {
        op: op.into(),
        grads: grads
            .iter()
            .copied()
            .filter(|&i| args[i].is_some())
            .collect(),
        args,
        cotangents: cotangents.to_vec(),
        private: Vec::new(),
    }
}

/// How tokens were sorted by expert: `order`, `slot`, `offsets`.
fn dispatched(experts: &[i32], n_experts: usize) -> [Option<Arg>; 3] {
    let mut order: Vec<i32> = (0..experts.len() as i32).collect();
    order.sort_by_key(|&f| experts[f as usize]);
    let mut slot = vec![0; order.len()];
    for (r, &f) in order.iter().enumerate() {
        slot[f as usize] = r as i32;
    }
    let offsets = (0..=n_experts as i32)
        .map(|e| experts.iter().filter(|&&x| x < e).count() as i32)
        .collect();
    let n = order.len();
    [
        ints(dims![R n], order),
        ints(dims![R n], slot),
        ints(dims![E n_experts + 1], offsets),
    ]
}

/// A sample of the named op; `None` for names that are no op to be run on their own (backward ops come by differentiation).
pub fn draw(name: &str, seed: u64) -> Option<Sample> {
    let g = &mut Gen::new(seed);
    let width = g.pick(&[1, 5, 16, 33]);
    Some(match name {
        "embed" => {
            let (b, t, v) = (g.pick(&[1, 3]), g.time(), g.pick(&[1, 7, 40]));
            let args = vec![g.ids(dims![B b, T t], v), g.arg(dims![V v, D width])];
            sample(Embed, args, &[1], &[0])
        }
        "linear" => {
            let n = g.pick(&[1, 3, 17, 64]);
            let x = g.shape(width);
            let args = vec![g.arg(x), g.arg(dims![I n, D width]), g.maybe(dims![I n])];
            sample(Linear, args, &[0, 1, 2], &[0])
        }
        "rms_norm" => {
            let (group, groups) = (g.pick(&[2, 6, 16, 33]), g.pick(&[1, 1, 3]));
            let x = g.shape(group * groups);
            let gate = g.pick(&[Gate::None, Gate::Before, Gate::After]);
            let w = g.pick(&[0, group, group * groups]);
            let op = RmsNorm {
                eps: 1e-5,
                group,
                zero_centered: w > 0 && g.flip(),
                gate,
            };
            let args = vec![
                g.arg(x.clone()),
                if w > 0 { g.arg(dims![D w]) } else { None },
                if gate == Gate::None { None } else { g.arg(x) },
            ];
            sample(op, args, &[0, 1, 2], &[0])
        }
        "rope" => {
            let (b, t, h) = (g.pick(&[1, 2]), g.time(), g.pick(&[1, 3]));
            let (dims, extra) = (2 * g.pick(&[1, 3, 8]), g.pick(&[0, 0, 4]));
            let op = Rope {
                dims,
                factor: g.pick(&[1.0, 1.3]),
                inverse: g.flip(),
            };
            let args = vec![
                g.arg(dims![B b, T t, H h, P dims + extra]),
                g.pos(b, t),
                g.map(dims![X dims / 2], f32::abs),
            ];
            sample(op, args, &[0], &[0])
        }
        "attention" => {
            let (b, t, p) = (g.pick(&[1, 2]), g.time(), g.pick(&[1, 8, 16]));
            let groups = g.pick(&[1, 2]);
            let h = groups * g.pick(&[1, 3]);
            let op = Attention {
                scale: 1.5 / (p as f64).sqrt(),
                window: g.pick(&[None, None, Some(1), Some(5)]),
            };
            // In decode the keys are a cache that is longer than what was written.
            let decode = g.below(4) == 0;
            let s = if decode { t + 9 } else { t };
            let slot = if decode {
                ints(dims![X 1], vec![g.pick(&[0, 4])])
            } else {
                None
            };
            let args = vec![
                g.arg(dims![B b, T t, H h, P p]),
                g.arg(dims![B b, S s, G groups, P p]),
                g.arg(dims![B b, S s, G groups, P p]),
                g.pos(b, t),
                slot,
            ];
            let cotangents: &[usize] = if decode { &[] } else { &[0] };
            sample(op, args, &[0, 1, 2], cotangents)
        }
        "causal_conv1d" => {
            let (b, t, k) = (g.pick(&[1, 2]), g.time(), g.pick(&[1, 2, 4]));
            let state = if k > 1 && g.below(3) == 0 {
                g.arg(dims![B b, T k - 1, I width])
            } else {
                None
            };
            let cotangents: &[usize] = if state.is_some() { &[] } else { &[0] };
            let args = vec![
                g.arg(dims![B b, T t, I width]),
                g.arg(dims![I width, K k]),
                g.maybe(dims![I width]),
                g.pos(b, t),
                state,
            ];
            sample(
                CausalConv1d { silu: g.flip() },
                args,
                &[0, 1, 2],
                cotangents,
            )
        }
        "selective_scan" => {
            let (b, t, n) = (
                g.pick(&[1, 2]),
                g.pick(&[1, 7, 63, 64]),
                g.pick(&[1, 4, 16]),
            );
            let groups = g.pick(&[1, 1, 2]);
            let i = groups * g.pick(&[1, 5, 16]);
            let state = if g.below(3) == 0 {
                g.arg(dims![B b, I i, N n])
            } else {
                None
            };
            let cotangents: &[usize] = if state.is_some() { &[] } else { &[0] };
            let private = if state.is_some() { vec![] } else { vec![1] };
            let args = vec![
                g.arg(dims![B b, T t, I i]),
                g.arg(dims![B b, T t, I i]),
                g.map(dims![I i, N n], |x| -0.1 - x.abs()),
                g.arg(dims![B b, T t, G groups, N n]),
                g.arg(dims![B b, T t, G groups, N n]),
                g.maybe(dims![I i]),
                g.maybe(dims![I i]),
                g.maybe(dims![B b, T t, I i]),
                g.pos(b, t),
                state,
            ];
            let op = SelectiveScan {
                chunk: g.pick(&[1, 8, 16, 100]),
            };
            Sample {
                private,
                ..sample(op, args, &[0, 1, 2, 3, 4, 5, 6, 7], cotangents)
            }
        }
        "ssd" => {
            let (b, t) = (g.pick(&[1, 2]), g.pick(&[1, 7, 63, 64]));
            let (p, n) = (g.pick(&[1, 8, 16]), g.pick(&[1, 5, 16]));
            let groups = g.pick(&[1, 2]);
            let h = groups * g.pick(&[1, 3]);
            let state = if g.below(3) == 0 {
                g.arg(dims![B b, H h, P p, N n])
            } else {
                None
            };
            let cotangents: &[usize] = if state.is_some() { &[] } else { &[0] };
            let private = if state.is_some() { vec![] } else { vec![1] };
            let args = vec![
                g.arg(dims![B b, T t, H h, P p]),
                g.arg(dims![B b, T t, H h]),
                g.map(dims![H h], |x| -0.1 - x.abs()),
                g.arg(dims![B b, T t, G groups, N n]),
                g.arg(dims![B b, T t, G groups, N n]),
                g.maybe(dims![H h]),
                g.maybe(dims![H h]),
                g.pos(b, t),
                state,
            ];
            let op = Ssd {
                chunk: g.pick(&[1, 8, 16, 100]),
                dt_limit: g.pick(&[(0.0, f64::INFINITY), (0.4, 0.9)]),
            };
            Sample {
                private,
                ..sample(op, args, &[0, 1, 2, 3, 4, 5, 6], cotangents)
            }
        }
        "gated_delta" => {
            let (b, t) = (g.pick(&[1, 2]), g.pick(&[1, 7, 63]));
            let (p, n) = (g.pick(&[1, 8]), g.pick(&[1, 5]));
            let groups = g.pick(&[1, 2]);
            let h = groups * g.pick(&[1, 3]);
            let state = if g.below(3) == 0 {
                g.arg(dims![B b, H h, N n, P p])
            } else {
                None
            };
            let cotangents: &[usize] = if state.is_some() { &[] } else { &[0] };
            let private = if state.is_some() { vec![] } else { vec![1] };
            let unit = 1.0 / (n as f32).sqrt();
            let args = vec![
                g.map(dims![B b, T t, G groups, N n], |x| x * unit),
                g.map(dims![B b, T t, G groups, N n], |x| x * unit),
                g.arg(dims![B b, T t, H h, P p]),
                g.map(dims![B b, T t, H h], |x| -x.abs()),
                g.map(dims![B b, T t, H h], f32::abs),
                g.pos(b, t),
                state,
            ];
            let op = GatedDelta {
                chunk: g.pick(&[1, 8, 64]),
            };
            Sample {
                private,
                ..sample(op, args, &[0, 1, 2, 3, 4], cotangents)
            }
        }
        "pointwise" => pointwise(g, width),
        "route" => {
            let (n_groups, top_groups) = g.pick(&[(1, 1), (1, 1), (4, 2)]);
            let e = n_groups * g.pick(&[4, 5]);
            let x = g.shape(e);
            let op = Route {
                top_k: g.pick(&[1, 2, 4]),
                score: g.pick(&[Score::SoftmaxAll, Score::SoftmaxChosen, Score::Sigmoid]),
                normalize: g.pick(&[Normalize::None, Normalize::Sum]),
                n_groups,
                top_groups,
                scale: g.pick(&[1.0, 2.5]),
            };
            let bias = if op.score == Score::Sigmoid {
                g.maybe(dims![E e])
            } else {
                None
            };
            sample(op, vec![g.map(x, |x| 3.0 * x), bias], &[0], &[0])
        }
        "balance" => {
            let (e, k) = (g.pick(&[2, 7]), g.pick(&[1, 2]));
            let x = g.shape(e);
            let experts = dims![B x[0].size, T x[1].size, K k];
            let args = vec![g.arg(x), g.ids(experts, e)];
            sample(Balance, args, &[0], &[0])
        }
        "dispatch" => {
            let (t, k, e) = (g.time(), g.pick(&[1, 2]), g.pick(&[1, 4, 9]));
            let args = vec![g.ids(dims![B 2, T t, K k], e)];
            sample(Dispatch { n_experts: e }, args, &[], &[])
        }
        "gather_rows" | "combine" | "grouped_linear" => {
            let (t, k, e) = (g.time(), g.pick(&[1, 2]), g.pick(&[1, 4, 9]));
            let experts: Vec<i32> = (0..t * k).map(|_| g.below(e) as i32).collect();
            let [order, slot, offsets] = dispatched(&experts, e);
            let tokens = dims![B 1, T t];
            match name {
                "gather_rows" => {
                    let args = vec![g.arg(dims![B 1, T t, D width]), order, slot];
                    sample(GatherRows, args, &[0], &[0])
                }
                "combine" => {
                    let args = vec![
                        g.arg(dims![R t * k, D width]),
                        order,
                        slot,
                        g.maybe(dims![B 1, T t, K k]),
                    ];
                    sample(Combine { tokens }, args, &[0, 3], &[0])
                }
                _ => {
                    let n = g.pick(&[1, 16, 33]);
                    let args = vec![
                        g.arg(dims![R t * k, D width]),
                        g.arg(dims![E e, I n, D width]),
                        offsets,
                    ];
                    sample(GroupedLinear, args, &[0, 1], &[0])
                }
            }
        }
        "linear_cross_entropy" => {
            let v = g.pick(&[1, 7, 65, 300]);
            let x = g.shape(width);
            let rows = dims![B x[0].size, T x[1].size];
            let n = x[0].size * x[1].size;
            let targets = (0..n)
                .map(|_| g.below(v + 1) as i32 - 1)
                .collect::<Vec<_>>();
            let op = LinearCrossEntropy {
                multiplier: g.pick(&[1.0, 0.5]),
                z_loss: g.pick(&[0.0, 1e-2]),
                z_all: g.flip(),
            };
            let args = vec![
                g.arg(x),
                g.map(dims![V v, D width], |x| 2.0 * x),
                ints(rows, targets),
                scalar(1.0 / n as f32),
            ];
            sample(op, args, &[0, 1], &[0])
        }
        "cache_write" => {
            let (b, t, s) = (g.pick(&[1, 2]), g.pick(&[1, 3, 7]), g.pick(&[9, 16]));
            let slot = g.below(s - t + 1) as i32;
            let args = vec![
                g.arg(dims![B b, S s, G 2, P width]),
                g.arg(dims![B b, T t, G 2, P width]),
                ints(dims![X 1], vec![slot]),
            ];
            sample(CacheWrite, args, &[], &[])
        }
        "draw" => {
            let (b, v) = (g.pick(&[1, 3]), g.pick(&[1, 7, 300, 3000]));
            // Coarse logits, so that many are equal.
            let step = g.pick(&[0.5, 0.0625]);
            let logits = g.map(dims![B b, T 1, V v], |x| (8.0 * x / step).round() * step);
            let settings = HostTensor::F32(vec![
                g.pick(&[0.0, 0.7, 1.0, 3.0]),
                g.pick(&[0.0, 1.0, 5.0, 200.0]),
                g.pick(&[1.0, 0.9, 0.3]),
            ]);
            let settings = Arg {
                ty: Type::f32(dims![X 3]),
                data: settings,
            };
            let bits = (0..2 * b).map(|_| g.next() as i32).collect();
            let args = vec![logits, Some(settings), ints(dims![B b, T 1, X 2], bits)];
            sample(Draw, args, &[], &[])
        }
        "cast" => {
            let x = g.shape(width);
            sample(Cast { to: DType::F32 }, vec![g.arg(x)], &[0], &[0])
        }
        "concat" => {
            let x = g.shape(width);
            let (mut y, mut z) = (x.clone(), x.clone());
            (y[2].size, z[2].size) = (g.pick(&[1, 8]), g.pick(&[3, 16]));
            let op = Concat { letter: Letter::D };
            sample(op, vec![g.arg(x), g.arg(y), g.arg(z)], &[0, 1, 2], &[0])
        }
        "split" => {
            let (a, b) = (g.pick(&[1, 8]), g.pick(&[3, 16]));
            let x = g.shape(width + a + b);
            let op = Split {
                sizes: dims![D width, D a, D b],
            };
            let cotangents: &[usize] = if g.flip() { &[0, 1, 2] } else { &[2] };
            sample(op, vec![g.arg(x)], &[0], cotangents)
        }
        "last" => {
            let x = g.shape(width);
            sample(Last, vec![g.arg(x)], &[0], &[0])
        }
        "reshape" => {
            let x = g.shape(width);
            let n = x.iter().map(|d| d.size).product::<usize>();
            let op = Reshape { dims: dims![X n] };
            sample(op, vec![g.arg(x)], &[0], &[0])
        }
        "rows" => {
            let (start, len, rest) = (g.below(3), g.pick(&[1, 4]), g.below(3));
            let args = vec![g.arg(dims![I start + len + rest, D width])];
            sample(Rows { start, len }, args, &[0], &[0])
        }
        "mean_square" => {
            let x = g.shape(width);
            sample(MeanSquare, vec![g.arg(x)], &[0], &[0])
        }
        "stat" => {
            let x = g.shape(width);
            let big = g.pick(&[1.0, 1e5]);
            sample(Stat, vec![g.map(x, |x| big * x)], &[], &[])
        }
        "global_norm" => {
            let x = g.shape(width);
            let args = vec![g.arg(x), g.arg(dims![X 1]), g.arg(dims![I 3, D width])];
            sample(GlobalNorm, args, &[], &[])
        }
        "adamw" => {
            let mut tensors = Vec::new();
            let norm = g.pick(&[0.5, 4.0]);
            let mut args = vec![scalar(1e-2), scalar(g.pick(&[1.0, 30.0])), scalar(norm)];
            for shape in [dims![I 5, D width], dims![D width]] {
                args.extend((0..3).map(|_| g.arg(shape.clone())));
                args.push(g.map(shape, f32::abs));
                tensors.push(AdamWTensor {
                    decay: g.pick(&[0.0, 0.1]),
                    lr_scale: g.pick(&[1.0, 0.5]),
                });
            }
            let op = AdamW {
                betas: (0.9, 0.95),
                eps: 1e-8,
                clip: g.pick(&[None, Some(1.0)]),
                tensors,
                copies: Vec::new(),
            };
            sample(op, args, &[], &[])
        }
        _ => return None,
    })
}

/// A random program over all functions, with arguments repeated in every way.
fn pointwise(g: &mut Gen, width: usize) -> Sample {
    let x = g.shape(width);
    let prefix = dims![B x[0].size, T x[1].size, D 1];
    let args = vec![
        g.map(x, |x| 3.0 * x),
        g.arg(dims![D width]),
        g.arg(dims![X 1]),
        g.arg(prefix),
    ];
    let mut p = Pointwise::new(args.len());
    // Relu and the functions of it have a corner at 0, which no random number hits.
    let smooth = [
        Un::Neg,
        Un::Sigmoid,
        Un::Silu,
        Un::Softplus,
        Un::Gelu,
        Un::GeluTanh,
        Un::Relu,
        Un::Scale(0.7),
        Un::Offset(-0.2),
    ];
    let mut last = 0;
    for k in 1..args.len() as u16 {
        let f = g.pick(&smooth);
        let a = p.un(f, last);
        let b = p.bin(g.pick(&[Bin::Add, Bin::Sub, Bin::Mul]), a, k);
        last = p.un(g.pick(&smooth), b);
    }
    // What grows fast gets what is small.
    let s = p.un(Un::Sigmoid, last);
    let e = p.un(Un::Exp, s);
    let c = p.konst(0.5);
    let last = p.bin(Bin::Mul, e, c);
    let square = p.bin(Bin::Mul, last, last);
    sample(p.out(last).out(square), args, &[0, 1, 2, 3], &[0, 1])
}
