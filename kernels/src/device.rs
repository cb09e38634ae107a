//! A GPU: one context, one stream, compiled modules, memory, and running of prepared commands.

#![allow(unsafe_code)] // calls into the driver and cuBLASLt

use crate::choices::Choices;
use crate::compile::{Compiler, KernelError, probe};
use crate::record::{Command, DType, Eight, Launch, Module, Param, Product, Target, View};
use cudarc::cublaslt::{result as lt, sys as ltsys};
use cudarc::driver::{result as cu, sys};
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Products of fewer operations are not worth timing.
const TUNED_FLOPS: f64 = 1e9;

/// Ways to compute a product that are timed.
const CANDIDATES: usize = 8;

/// Memory that cuBLASLt may use for one product.
pub const PRODUCT_SCRATCH: usize = 64 << 20;

/// A device with everything loaded on it.
pub struct Device {
    ctx: sys::CUcontext,
    dev: sys::CUdevice,
    stream: sys::CUstream,
    blas: ltsys::cublasLtHandle_t,
    product_scratch: u64,
    /// The number 1.
    one: u64,
    compiler: Compiler,
    modules: HashMap<Module, sys::CUmodule>,
    name: String,
    target: Target,
    choices: Choices,
    /// Sizes of what is allocated.
    sizes: Mutex<HashMap<u64, usize>>,
}

// SAFETY: a Device is used from one thread at a time (methods that touch the stream make the context current first), and the driver's
// handles may move between threads.
unsafe impl Send for Device {}

/// Commands with their kernels and algorithms found: running them asks nothing of the host but the launches.
pub struct Prepared {
    steps: Vec<Step>,
}

// SAFETY: handles and addresses, used only through the Device that made them.
unsafe impl Send for Prepared {}

impl Prepared {
    /// Whether [`Device::tune`] has something to do.
    pub fn untimed(&self) -> bool {
        self.steps
            .iter()
            .any(|s| matches!(s, Step::Product(p) if p.candidates.len() > 1))
    }
}

/// A captured run: one launch does it all.
pub struct Captured(sys::CUgraphExec);

// SAFETY: a handle, used only through the Device that made it.
unsafe impl Send for Captured {}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: made by `Device::capture`, destroyed once; the driver waits for a replay in flight.
        let _ = unsafe { cu::graph::exec_destroy(self.0) };
    }
}

/// Memory of the host that the device copies from and to without the host's help.
pub struct Pinned {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: memory that this owns.
unsafe impl Send for Pinned {}

impl Pinned {
    /// The bytes. No copy may be in flight.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this size, zeroed, and not changed by the host while borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// The bytes, to write. No copy may be in flight.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `Device::pinned`, freed once.
            let _ = unsafe { cu::free_host(self.ptr.cast()) };
        }
    }
}

enum Step {
    Kernel {
        function: sys::CUfunction,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        early: bool,
        words: Vec<u64>,
        /// Where each parameter starts in `words`.
        starts: Vec<usize>,
    },
    Product(Box<BlasProduct>),
    Zero(u64, usize),
    Copy(u64, u64, usize),
}

struct BlasProduct {
    desc: ltsys::cublasLtMatmulDesc_t,
    layouts: [ltsys::cublasLtMatrixLayout_t; 3],
    algo: ltsys::cublasLtMatmulAlgo_t,
    /// What else could be taken, best guess first; empty where the choice is made.
    candidates: Vec<ltsys::cublasLtMatmulAlgo_t>,
    of: Product,
}

impl BlasProduct {
    /// What the choice of an algorithm depends on.
    fn key(&self) -> String {
        let p = &self.of;
        let align = |ptr: u64| 1u32 << ptr.trailing_zeros().min(8);
        format!(
            "{:?} {:?} {}->{} {} {:?}",
            p.sizes,
            p.transposed,
            match &p.eights {
                Some(e) => format!(
                    "{:?}x{:?}{}",
                    e.formats.0,
                    e.formats.1,
                    if e.exact { "!" } else { "" }
                ),
                None => p.input.c_name().to_string(),
            },
            p.output.c_name(),
            match (p.beta_at, p.beta == 0.0, p.add) {
                (0, true, _) => "=",
                (0, false, 0) => "+=",
                (0, false, _) => "+",
                _ => "*=",
            },
            [align(p.a), align(p.b), align(p.c | p.add)]
        )
    }
}

impl Drop for BlasProduct {
    fn drop(&mut self) {
        // SAFETY: made by `Device::product`, destroyed once.
        unsafe {
            for l in self.layouts {
                let _ = lt::destroy_matrix_layout(l);
            }
            let _ = lt::destroy_matmul_desc(self.desc);
        }
    }
}

fn driver(what: &str) -> impl Fn(cu::DriverError) -> KernelError + '_ {
    move |e| KernelError::Driver {
        what: what.to_string(),
        why: e.to_string(),
    }
}

fn blas(what: &str) -> impl Fn(lt::CublasError) -> KernelError + '_ {
    move |e| KernelError::Driver {
        what: format!("cuBLASLt: {what}"),
        why: e.to_string(),
    }
}

/// Name of the architecture with this compute capability, with its own instructions where it has them.
pub(crate) fn arch(major: i32, minor: i32) -> String {
    match (major, minor) {
        (9, 0) => "sm_90a".to_string(),
        _ => format!("sm_{major}{minor}"),
    }
}

/// The driver's form of a view.
fn encode(v: &View) -> Result<[u64; 16], KernelError> {
    use sys::{
        CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Outside,
        CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
        CUtensorMapSwizzle_enum as Swizzle,
    };
    // The driver writes to a multiple of 64 bytes.
    #[repr(align(64))]
    struct Map(sys::CUtensorMap);
    let mut map = Map(sys::CUtensorMap { opaque: [0; 16] });
    let dims: Vec<u64> = v.dims.iter().map(|&x| x as u64).collect();
    let strides: Vec<u64> = v.strides.iter().map(|&x| x as u64).collect();
    let sizes: Vec<u32> = v.sizes.iter().map(|&x| x as u32).collect();
    let steps = vec![1u32; dims.len()];
    // SAFETY: as many sizes as dims, and one stride less; the driver checks the values.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map.0,
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            dims.len() as u32,
            v.ptr as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            sizes.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(driver(&format!("describing {v:?} to the copy engine")))?;
    Ok(map.0.opaque)
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`KernelError::Missing`] names a library that is not there; [`KernelError::Driver`] what the driver refused.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        probe()?;
        cu::init().map_err(driver("starting the driver"))?;
        let dev = cu::device::get(ordinal as i32).map_err(driver("finding the device"))?;
        use sys::CUdevice_attribute_enum as Attr;
        // SAFETY: the device exists; the context is made current before anything uses it.
        unsafe {
            let of = |attr| {
                cu::device::get_attribute(dev, attr).map_err(driver("asking for the capability"))
            };
            let major = of(Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = of(Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let count = of(Attr::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let shared = of(Attr::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
            let multiprocessors = usize::try_from(count).unwrap_or(0);
            let compiler = Compiler::new(&arch(major, minor))?;
            let name = cu::device::get_name(dev).map_err(driver("asking for the name"))?;
            let ctx = cu::primary_ctx::retain(dev).map_err(driver("making a context"))?;
            cu::ctx::set_current(ctx).map_err(driver("making the context current"))?;
            let stream = cu::stream::create(cu::stream::StreamKind::NonBlocking)
                .map_err(driver("making a stream"))?;
            let blas = lt::create_handle().map_err(blas("start"))?;
            let product_scratch = cu::malloc_sync(PRODUCT_SCRATCH)
                .map_err(driver("allocating memory for products"))?;
            let one = cu::malloc_sync(4).map_err(driver("allocating memory for products"))?;
            cu::memcpy_htod_sync(one, &[1f32]).map_err(driver("writing a factor"))?;
            Ok(Device {
                ctx,
                dev,
                stream,
                blas,
                product_scratch,
                one,
                compiler,
                modules: HashMap::new(),
                choices: Choices::open(&name),
                name,
                target: Target {
                    hopper: (major, minor) == (9, 0),
                    early: major >= 9,
                    fp8: (major, minor) >= (8, 9),
                    shared,
                    multiprocessors,
                    deterministic: false,
                },
                sizes: Mutex::new(HashMap::from([(product_scratch, PRODUCT_SCRATCH)])),
            })
        }
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What launchers may count on here; the order of sums is left open unless the caller sets `deterministic`.
    pub fn target(&self) -> Target {
        self.target
    }

    fn enter(&self) -> Result<(), KernelError> {
        // SAFETY: the context lives as long as self.
        unsafe { cu::ctx::set_current(self.ctx) }.map_err(driver("making the context current"))
    }

    /// Free and total bytes.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.enter()?;
        cu::mem_get_info().map_err(driver("asking for free memory"))
    }

    fn sizes(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes allocated here, with the scratch area of products.
    pub fn allocated(&self) -> usize {
        self.sizes().values().sum()
    }

    /// Allocates zeroed bytes; 0 bytes give address 0.
    ///
    /// # Errors
    /// [`KernelError::Memory`].
    pub fn allocate(&self, bytes: usize) -> Result<u64, KernelError> {
        if bytes == 0 {
            return Ok(0);
        }
        self.enter()?;
        // SAFETY: fresh memory of that size is zeroed before the address leaves.
        unsafe {
            let ptr = cu::malloc_sync(bytes).map_err(|e| KernelError::Memory {
                bytes,
                why: e.to_string(),
            })?;
            cu::memset_d8_async(ptr, 0, bytes, self.stream).map_err(driver("zeroing"))?;
            self.sync()?;
            self.sizes().insert(ptr, bytes);
            Ok(ptr)
        }
    }

    /// Gives memory back.
    ///
    /// # Safety
    /// `ptr` came from [`Device::allocate`] and nothing uses it any more.
    pub unsafe fn free(&self, ptr: u64) {
        if ptr != 0 && self.enter().is_ok() {
            // SAFETY: the caller's promise; work in flight ends first.
            unsafe {
                let _ = self.sync();
                let _ = cu::free_sync(ptr);
            }
            self.sizes().remove(&ptr);
        }
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// [`KernelError::Driver`], also for a fault of an earlier kernel.
    pub fn sync(&self) -> Result<(), KernelError> {
        self.enter()?;
        // SAFETY: the stream lives as long as self.
        unsafe { cu::stream::synchronize(self.stream) }.map_err(driver("waiting for the device"))
    }

    /// Copies to the device, in stream order; the source may be dropped afterwards.
    ///
    /// # Safety
    /// `ptr` has room for the bytes.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn write(&self, ptr: u64, bytes: &[u8]) -> Result<(), KernelError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's promise; a copy from pageable memory has read its source when it returns.
        unsafe { cu::memcpy_htod_async(ptr, bytes, self.stream) }
            .map_err(driver("copying to the device"))
    }

    /// Copies from the device and waits.
    ///
    /// # Safety
    /// `ptr` holds the bytes.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn read(&self, ptr: u64, bytes: &mut [u8]) -> Result<(), KernelError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's promise; the copy has ended before this returns.
        unsafe { cu::memcpy_dtoh_async(bytes, ptr, self.stream) }
            .map_err(driver("copying from the device"))?;
        self.sync()
    }

    /// Fills with a byte.
    ///
    /// # Safety
    /// `ptr` has room for the bytes.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn fill(&self, ptr: u64, byte: u8, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { cu::memset_d8_async(ptr, byte, bytes, self.stream) }.map_err(driver("filling"))
    }

    /// Compiles and loads what the commands need; `progress` hears what will take long.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn prepare(
        &mut self,
        commands: &[Command],
        progress: impl FnMut(&str),
    ) -> Result<Prepared, KernelError> {
        self.enter()?;
        let mut new = Vec::new();
        let mut seen = HashSet::new();
        for command in commands {
            if let Command::Launch(l) = command
                && !self.modules.contains_key(&l.module)
                && seen.insert(&l.module)
            {
                new.push(&l.module);
            }
        }
        for (module, cubin) in new.iter().zip(self.compiler.cubins(&new, progress)) {
            self.load_module(module, &cubin?)?;
        }
        let mut steps = Vec::with_capacity(commands.len());
        for command in commands {
            steps.push(match command {
                Command::Launch(l) => self.kernel(l)?,
                Command::Product(p) => Step::Product(Box::new(self.product(p)?)),
                Command::Zero { ptr, bytes } => Step::Zero(*ptr, *bytes),
                Command::Copy { to, from, bytes } => Step::Copy(*to, *from, *bytes),
            });
        }
        Ok(Prepared { steps })
    }

    fn module(&mut self, m: &Module) -> Result<sys::CUmodule, KernelError> {
        if let Some(&loaded) = self.modules.get(m) {
            return Ok(loaded);
        }
        let cubin = self.compiler.cubin(m)?;
        self.load_module(m, &cubin)
    }

    fn load_module(&mut self, m: &Module, cubin: &[u8]) -> Result<sys::CUmodule, KernelError> {
        // SAFETY: the driver checks the image, which is alive during the call.
        let loaded = unsafe { cu::module::load_data(cubin.as_ptr().cast()) }
            .map_err(driver(&format!("loading {}", m.stem)))?;
        self.modules.insert(m.clone(), loaded);
        Ok(loaded)
    }

    fn kernel(&mut self, l: &Launch) -> Result<Step, KernelError> {
        let module = self.module(&l.module)?;
        let what = format!("kernel {} of {}", l.function, l.module.stem);
        let bad = || KernelError::Driver {
            what: what.clone(),
            why: format!(
                "a grid of {:?} blocks of {} threads is too large",
                l.grid, l.block
            ),
        };
        let name = CString::new(l.function).map_err(|_| bad())?;
        // SAFETY: the module stays loaded as long as self.
        let function = unsafe { cu::module::get_function(module, name) }.map_err(driver(&what))?;
        // More than that has to be asked for; a kernel has a little of its own besides.
        if l.shared > 46 << 10 {
            use sys::CUfunction_attribute_enum as Attr;
            // SAFETY: the function was found above.
            unsafe {
                cu::function::set_function_attribute(
                    function,
                    Attr::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    l.shared as i32,
                )
            }
            .map_err(driver(&format!(
                "{what} with {} bytes of shared memory",
                l.shared
            )))?;
        }
        if l.grid[1] > 65535 || l.grid[2] > 65535 || l.grid[0] > i32::MAX as usize {
            return Err(bad());
        }
        let (mut words, mut starts) = (Vec::new(), Vec::new());
        for p in &l.params {
            starts.push(words.len());
            match p {
                Param::Ptr(x) => words.push(*x),
                Param::Long(x) => words.push(*x as u64),
                Param::Int(x) => words.push(u64::from(*x as u32)),
                Param::Float(x) => words.push(u64::from(x.to_bits())),
                Param::Double(x) => words.push(x.to_bits()),
                Param::Words(w) => words.extend(w),
                Param::View(v) => words.extend(encode(v)?),
            }
        }
        Ok(Step::Kernel {
            function,
            grid: l.grid.map(|x| x as u32),
            block: l.block as u32,
            shared: l.shared as u32,
            early: l.early,
            words,
            starts,
        })
    }

    /// Row-major `c = a b` is column-major `c' = b' a'`.
    fn product(&self, p: &Product) -> Result<BlasProduct, KernelError> {
        let kind = |t: DType| match t {
            DType::F32 | DType::I32 => ltsys::cudaDataType::CUDA_R_32F,
            DType::Bf16 => ltsys::cudaDataType::CUDA_R_16BF,
            DType::F16 => ltsys::cudaDataType::CUDA_R_16F,
            DType::Eight(Eight::E4m3) => ltsys::cudaDataType::CUDA_R_8F_E4M3,
            DType::Eight(Eight::E5m2) => ltsys::cudaDataType::CUDA_R_8F_E5M2,
        };
        let (m, n, k) = p.sizes;
        let (kind_a, kind_b) = match &p.eights {
            Some(e) => (
                kind(DType::Eight(e.formats.0)),
                kind(DType::Eight(e.formats.1)),
            ),
            None => (kind(p.input), kind(p.input)),
        };
        let layout = |kind: ltsys::cudaDataType, rows: usize, cols: usize| {
            lt::create_matrix_layout(kind, rows as u64, cols as u64, rows as i64)
                .map_err(blas("layout"))
        };
        let stored =
            |flip: bool, rows: usize, cols: usize| if flip { (cols, rows) } else { (rows, cols) };
        let (ta, tb) = p.transposed;
        let (b_rows, b_cols) = stored(tb, n, k);
        let (a_rows, a_cols) = stored(ta, k, m);
        let layouts = [
            layout(kind_b, b_rows, b_cols)?,
            layout(kind_a, a_rows, a_cols)?,
            layout(kind(p.output), n, m)?,
        ];
        let desc = lt::create_matmul_desc(
            ltsys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            ltsys::cudaDataType::CUDA_R_32F,
        )
        .map_err(blas("description"))?;
        let pref = lt::create_matmul_pref().map_err(blas("preference"))?;
        let mut found =
            [std::mem::MaybeUninit::<ltsys::cublasLtMatmulHeuristicResult_t>::uninit(); CANDIDATES];
        let mut n_found = 0;
        use ltsys::cublasLtMatmulDescAttributes_t as D;
        use ltsys::cublasLtMatmulPreferenceAttributes_t as P;
        let flip = |f: bool| i32::from(f);
        let align = |ptr: u64| 1u32 << ptr.trailing_zeros().min(8);
        // SAFETY: handles made above; each attribute is given as the type that the library documents for it.
        let asked = unsafe {
            let set = |attr, value: &i32| {
                lt::set_matmul_desc_attribute(desc, attr, std::ptr::from_ref(value).cast(), 4)
            };
            let prefer = |attr, value: &[u8]| {
                lt::set_matmul_pref_attribute(pref, attr, value.as_ptr().cast(), value.len())
            };
            let mode = match p.beta_at {
                0 => ltsys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_HOST,
                _ => ltsys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE,
            };
            let scaled = match &p.eights {
                Some(e) => {
                    let fast = [i8::from(!e.exact)];
                    let give = |attr, value: &[u8]| {
                        lt::set_matmul_desc_attribute(
                            desc,
                            attr,
                            value.as_ptr().cast(),
                            value.len(),
                        )
                    };
                    give(
                        D::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                        &e.scales.1.to_ne_bytes(),
                    )
                    .and_then(|()| {
                        give(
                            D::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                            &e.scales.0.to_ne_bytes(),
                        )
                    })
                    .and_then(|()| give(D::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast.map(|f| f as u8)))
                }
                None => Ok(()),
            };
            scaled
                .and_then(|()| set(D::CUBLASLT_MATMUL_DESC_POINTER_MODE, &(mode as i32)))
                .and_then(|()| set(D::CUBLASLT_MATMUL_DESC_TRANSA, &flip(tb)))
                .and_then(|()| set(D::CUBLASLT_MATMUL_DESC_TRANSB, &flip(ta)))
                .and_then(|()| {
                    prefer(
                        P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                        &PRODUCT_SCRATCH.to_ne_bytes(),
                    )
                })
                .and_then(|()| {
                    prefer(
                        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                        &align(p.b).to_ne_bytes(),
                    )
                })
                .and_then(|()| {
                    prefer(
                        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                        &align(p.a).to_ne_bytes(),
                    )
                })
                .and_then(|()| {
                    prefer(
                        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                        &align(p.c | p.add).to_ne_bytes(),
                    )
                })
                .and_then(|()| {
                    prefer(
                        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                        &align(p.c).to_ne_bytes(),
                    )
                })
                .and_then(|()| {
                    ltsys::cublasLtMatmulAlgoGetHeuristic(
                        self.blas,
                        desc,
                        layouts[0],
                        layouts[1],
                        layouts[2],
                        layouts[2],
                        pref,
                        CANDIDATES as i32,
                        found.as_mut_ptr().cast(),
                        &mut n_found,
                    )
                    .result()
                })
        };
        // SAFETY: made above, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(pref) };
        let what = format!("a product of {:?} {p:?}", p.sizes);
        asked.map_err(blas(&what))?;
        let candidates: Vec<_> = found[..usize::try_from(n_found).unwrap_or(0)]
            .iter()
            // SAFETY: as many were written as were said to be found.
            .map(|r| unsafe { r.assume_init() })
            .filter(|r| r.state == ltsys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|r| r.algo)
            .collect();
        let first = candidates.first().ok_or_else(|| KernelError::Driver {
            what: format!("cuBLASLt: {what}"),
            why: "no algorithm for it".into(),
        })?;
        let mut product = BlasProduct {
            desc,
            layouts,
            algo: *first,
            candidates: Vec::new(),
            of: p.clone(),
        };
        match self.choices.get(&product.key()) {
            Some(algo) => product.algo = algo,
            None if 2.0 * m as f64 * n as f64 * k as f64 >= TUNED_FLOPS => {
                product.candidates = candidates;
            }
            None => {}
        }
        Ok(product)
    }

    /// Times the ways to compute each large product that has not been timed on this machine before, takes the fastest, and keeps the choice
    /// on disk. Reads operands where they are and writes results elsewhere; where there is no room for that, nothing is timed.
    ///
    /// # Safety
    /// As [`Device::run`].
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn tune(
        &mut self,
        prepared: &mut Prepared,
        mut progress: impl FnMut(&str),
    ) -> Result<(), KernelError> {
        let mut untimed: Vec<&mut BlasProduct> = Vec::new();
        for step in &mut prepared.steps {
            if let Step::Product(p) = step
                && p.candidates.len() > 1
            {
                untimed.push(p);
            }
        }
        let bytes = |p: &Product| p.sizes.0 * p.sizes.1 * p.output.bytes();
        let largest = untimed.iter().map(|p| bytes(&p.of)).max().unwrap_or(0);
        if largest == 0 {
            return Ok(());
        }
        let Ok(elsewhere) = self.allocate(largest) else {
            return Ok(());
        };
        let keys: HashSet<String> = untimed.iter().map(|p| p.key()).collect();
        progress(&format!(
            "timing the products of {} shapes, once on this machine",
            keys.len()
        ));
        // SAFETY: the caller's promise; results go to fresh memory that holds the largest of them.
        let timed = untimed.into_iter().try_for_each(|p| unsafe {
            let key = p.key();
            let candidates = std::mem::take(&mut p.candidates);
            if let Some(known) = self.choices.get(&key) {
                p.algo = known;
                return Ok(());
            }
            let home = std::mem::replace(&mut p.of.c, elsewhere);
            let best = self.fastest(p, &candidates);
            p.of.c = home;
            p.algo = best?;
            self.choices.put(key, p.algo);
            Ok(())
        });
        // SAFETY: allocated above, no longer in use once all work is done, which freeing waits for.
        unsafe { self.free(elsewhere) };
        self.choices.save();
        timed
    }

    /// # Safety
    /// As [`Device::run`].
    unsafe fn fastest(
        &self,
        p: &mut BlasProduct,
        candidates: &[ltsys::cublasLtMatmulAlgo_t],
    ) -> Result<ltsys::cublasLtMatmulAlgo_t, KernelError> {
        const ROUNDS: usize = 3;
        let fail = driver("timing products");
        let flags = sys::CUevent_flags_enum::CU_EVENT_DEFAULT;
        let first = p.algo;
        let mut best = (f32::INFINITY, first);
        // SAFETY: the caller's promise; events are recorded on one stream and destroyed once.
        unsafe {
            let (start, end) = (
                cu::event::create(flags).map_err(&fail)?,
                cu::event::create(flags).map_err(&fail)?,
            );
            let timed = candidates.iter().try_for_each(|&algo| {
                p.algo = algo;
                // The first run is not timed; an algorithm that fails is none.
                if self.multiply(p).is_err() {
                    return Ok(());
                }
                for _ in 0..ROUNDS {
                    cu::event::record(start, self.stream).map_err(&fail)?;
                    self.multiply(p)?;
                    cu::event::record(end, self.stream).map_err(&fail)?;
                    self.sync()?;
                    let ms = cu::event::elapsed(start, end).map_err(&fail)?;
                    if ms < best.0 {
                        best = (ms, algo);
                    }
                }
                Ok(())
            });
            let _ = cu::event::destroy(start);
            let _ = cu::event::destroy(end);
            p.algo = first;
            timed.map(|()| best.1)
        }
    }

    /// # Safety
    /// As [`Device::run`].
    unsafe fn multiply(&self, p: &BlasProduct) -> Result<(), KernelError> {
        let (alpha, beta): (*const c_void, *const c_void) = match p.of.beta_at {
            0 => (
                std::ptr::from_ref(&p.of.alpha).cast(),
                std::ptr::from_ref(&p.of.beta).cast(),
            ),
            at => (self.one as *const c_void, at as *const c_void),
        };
        // SAFETY: the caller's promise; the factors are where the description says.
        unsafe {
            lt::matmul(
                self.blas,
                p.desc,
                alpha,
                beta,
                p.of.b as *const c_void,
                p.layouts[0],
                p.of.a as *const c_void,
                p.layouts[1],
                match p.of.add {
                    0 => p.of.c as *const c_void,
                    add => add as *const c_void,
                },
                p.layouts[2],
                p.of.c as *mut c_void,
                p.layouts[2],
                &p.algo,
                self.product_scratch as *mut c_void,
                PRODUCT_SCRATCH,
                self.stream.cast(),
            )
        }
        .map_err(blas("product"))
    }

    /// Zeroed memory of the host for copies that wait for nothing.
    ///
    /// # Errors
    /// [`KernelError::Memory`].
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, KernelError> {
        if bytes == 0 {
            let ptr = std::ptr::NonNull::dangling().as_ptr();
            return Ok(Pinned { ptr, bytes });
        }
        self.enter()?;
        // SAFETY: zeroed before it leaves.
        unsafe {
            let ptr: *mut u8 = cu::malloc_host(bytes, 0)
                .map_err(|e| KernelError::Memory {
                    bytes,
                    why: e.to_string(),
                })?
                .cast();
            ptr.write_bytes(0, bytes);
            Ok(Pinned { ptr, bytes })
        }
    }

    /// Copies from the device without waiting; the bytes may be looked at after [`Device::sync`].
    ///
    /// # Safety
    /// `ptr` holds as many bytes, and `to` stays where it is and is not touched until then.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn read_later(&self, ptr: u64, to: &mut [u8]) -> Result<(), KernelError> {
        if to.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { cu::memcpy_dtoh_async(to, ptr, self.stream) }
            .map_err(driver("copying from the device"))
    }

    /// Captures a part of prepared commands, without running it.
    ///
    /// # Safety
    /// As [`Device::run`], for as long as the result is replayed.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn capture(
        &self,
        prepared: &Prepared,
        range: std::ops::Range<usize>,
    ) -> Result<Captured, KernelError> {
        self.enter()?;
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        // SAFETY: the stream lives as long as self; what is begun is ended, also after a failure.
        unsafe {
            cu::stream::begin_capture(self.stream, MODE).map_err(driver("starting a capture"))?;
            let recorded = self.run(prepared, range);
            let graph = cu::stream::end_capture(self.stream);
            recorded?;
            let graph = graph.map_err(driver("ending a capture"))?;
            let none = sys::CUgraphInstantiate_flags_enum(0);
            let exec = cu::graph::instantiate(graph, none);
            let _ = cu::graph::destroy(graph);
            exec.map(Captured).map_err(driver("making a graph"))
        }
    }

    /// Runs what was captured, in stream order, without waiting.
    ///
    /// # Safety
    /// As [`Device::run`].
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn replay(&self, captured: &Captured) -> Result<(), KernelError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { cu::graph::launch(captured.0, self.stream) }.map_err(driver("running a graph"))
    }

    /// Replays what was captured in turn, `runs` times in all, queued ahead; the seconds that each took on the device.
    ///
    /// # Safety
    /// As [`Device::run`].
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn time_replays(
        &self,
        captured: &[Captured],
        runs: usize,
    ) -> Result<Vec<f64>, KernelError> {
        let turns: Vec<&Captured> = captured.iter().cycle().take(runs).collect();
        // SAFETY: the caller's promise.
        self.between(turns.len(), |i| unsafe { self.replay(turns[i]) })
    }

    /// Bytes read and written in a second by a copy of so many bytes; the best of a few.
    ///
    /// # Errors
    /// [`KernelError::Memory`] where there is no room for it.
    pub fn copy_rate(&self, bytes: usize) -> Result<f64, KernelError> {
        const COPIES: usize = 10;
        let from = self.allocate(bytes)?;
        let to = self.allocate(bytes)?;
        // SAFETY: both have this size and are freed once the work has ended.
        let times = unsafe {
            let times = self.fill(from, 0x3c, bytes).and_then(|()| {
                self.between(COPIES, |_| {
                    cu::memcpy_dtod_async(to, from, bytes, self.stream).map_err(driver("copying"))
                })
            });
            self.free(from);
            self.free(to);
            times?
        };
        Ok(2.0 * bytes as f64 / times.into_iter().fold(f64::INFINITY, f64::min))
    }

    /// The seconds on the device that each of `n` pieces of work takes, which `work` queues without waiting.
    fn between(
        &self,
        n: usize,
        mut work: impl FnMut(usize) -> Result<(), KernelError>,
    ) -> Result<Vec<f64>, KernelError> {
        self.enter()?;
        let fail = driver("timing");
        let flags = sys::CUevent_flags_enum::CU_EVENT_DEFAULT;
        let mut events = Vec::with_capacity(n + 1);
        let mut times = Vec::with_capacity(n);
        // SAFETY: events are made here, recorded on one stream and destroyed once.
        unsafe {
            let ran = (|| {
                for i in 0..=n {
                    if i > 0 {
                        work(i - 1)?;
                    }
                    let event = cu::event::create(flags).map_err(&fail)?;
                    events.push(event);
                    cu::event::record(event, self.stream).map_err(&fail)?;
                }
                self.sync()?;
                for pair in events.windows(2) {
                    let ms = cu::event::elapsed(pair[0], pair[1]).map_err(&fail)?;
                    times.push(f64::from(ms) * 1e-3);
                }
                Ok(())
            })();
            for event in events {
                let _ = cu::event::destroy(event);
            }
            ran.map(|()| times)
        }
    }

    /// Runs parts of prepared commands one after the other; the seconds that each took on the device.
    ///
    /// # Safety
    /// As [`Device::run`].
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn time(
        &self,
        prepared: &Prepared,
        parts: &[std::ops::Range<usize>],
    ) -> Result<Vec<f64>, KernelError> {
        // SAFETY: the caller's promise.
        self.between(parts.len(), |i| unsafe {
            self.run(prepared, parts[i].clone())
        })
    }

    /// Runs a part of prepared commands, in stream order, without waiting.
    ///
    /// # Safety
    /// The commands were prepared by this device, and every address in them is memory of the size that its command takes.
    ///
    /// # Errors
    /// [`KernelError::Driver`].
    pub unsafe fn run(
        &self,
        prepared: &Prepared,
        range: std::ops::Range<usize>,
    ) -> Result<(), KernelError> {
        self.enter()?;
        for step in &prepared.steps[range] {
            // SAFETY: the caller's promise; parameters are laid out as the kernels declare them.
            unsafe { self.step(step)? };
        }
        Ok(())
    }

    /// # Safety
    /// As [`Device::run`].
    unsafe fn step(&self, step: &Step) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe {
            match step {
                Step::Kernel {
                    function,
                    grid,
                    block,
                    shared,
                    early,
                    words,
                    starts,
                } => {
                    let mut params: Vec<*mut c_void> = starts
                        .iter()
                        .map(|&s| words[s..].as_ptr().cast_mut().cast())
                        .collect();
                    // SAFETY: a plain struct of numbers, of which 0 is one.
                    let mut begin: sys::CUlaunchAttribute = std::mem::zeroed();
                    begin.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                    begin.value.programmaticStreamSerializationAllowed = 1;
                    let config = sys::CUlaunchConfig {
                        gridDimX: grid[0],
                        gridDimY: grid[1],
                        gridDimZ: grid[2],
                        blockDimX: *block,
                        blockDimY: 1,
                        blockDimZ: 1,
                        sharedMemBytes: *shared,
                        hStream: self.stream,
                        attrs: &raw mut begin,
                        numAttrs: u32::from(*early),
                    };
                    let none = std::ptr::null_mut();
                    sys::cuLaunchKernelEx(&raw const config, *function, params.as_mut_ptr(), none)
                        .result()
                        .map_err(driver("launching a kernel"))
                }
                Step::Product(p) => self.multiply(p),
                Step::Zero(ptr, bytes) => {
                    cu::memset_d8_async(*ptr, 0, *bytes, self.stream).map_err(driver("zeroing"))
                }
                Step::Copy(to, from, bytes) => {
                    cu::memcpy_dtod_async(*to, *from, *bytes, self.stream)
                        .map_err(driver("copying"))
                }
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.sync().is_err() {
            return;
        }
        // SAFETY: all made by `open` or `module`, released once, with no work in flight.
        unsafe {
            for &m in self.modules.values() {
                let _ = cu::module::unload(m);
            }
            let _ = lt::destroy_handle(self.blas);
            let _ = cu::free_sync(self.product_scratch);
            let _ = cu::free_sync(self.one);
            let _ = cu::stream::destroy(self.stream);
            let _ = cu::primary_ctx::release(self.dev);
        }
    }
}
