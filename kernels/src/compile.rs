//! CUDA C++ to machine code with NVRTC, cached on disk by the hash of what goes in.

#![allow(unsafe_code)] // calls into NVRTC

use crate::record::Module;
use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What every source begins with.
const HEAD: &str = concat!(
    include_str!("common.cuh"),
    include_str!("hopper.cuh"),
    include_str!("mma.cuh")
);

/// What can go wrong between a launcher and the device.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KernelError {
    /// A library is not installed where the loader looks.
    #[error("{library} was not found ({looked}); {hint}")]
    Missing {
        /// Such as `libnvrtc`.
        library: &'static str,
        /// Where it was looked for.
        looked: String,
        /// What would help.
        hint: &'static str,
    },
    /// The compiler refused a source: a bug here.
    #[error("kernel {stem} does not compile for {arch}: {log}")]
    Compile {
        /// Op file.
        stem: &'static str,
        /// Architecture.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// A call of the driver failed.
    #[error("{what} failed: {why}")]
    Driver {
        /// What was tried.
        what: String,
        /// The driver's words.
        why: String,
    },
    /// No memory of that size.
    #[error("{bytes} bytes cannot be allocated on the device: {why}")]
    Memory {
        /// How many.
        bytes: usize,
        /// The driver's words.
        why: String,
    },
}

/// `$XDG_CACHE_HOME/marimba` or `~/.cache/marimba`.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let home = |var: &str| std::env::var_os(var).filter(|v| !v.is_empty());
    home("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| home("HOME").map(|h| PathBuf::from(h).join(".cache")))
        .map(|f| f.join("marimba"))
}

/// Where the dynamic loader looks.
fn looked(names: &str) -> String {
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    format!("{names} in LD_LIBRARY_PATH={path:?} and the system's library folders")
}

/// Requires the driver, NVRTC and cuBLASLt.
pub(crate) fn probe() -> Result<(), KernelError> {
    // SAFETY: these only try to open the libraries.
    let (driver, lt) = unsafe {
        (
            cudarc::driver::sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        )
    };
    if !driver {
        return Err(KernelError::Missing {
            library: "libcuda",
            looked: looked("libcuda.so, libcuda.so.1"),
            hint: "it comes with the NVIDIA driver",
        });
    }
    if !lt {
        return Err(KernelError::Missing {
            library: "libcublasLt",
            looked: looked("libcublasLt.so, libcublasLt.so.13, libcublasLt.so.12"),
            hint: "it comes with the CUDA toolkit and the package nvidia-cublas; name its folder in LD_LIBRARY_PATH",
        });
    }
    Compiler::probe()
}

/// Compiles modules for one architecture.
#[derive(Debug)]
pub struct Compiler {
    arch: String,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// For an architecture such as `sm_90a`. Results are kept under `$XDG_CACHE_HOME/marimba` or `~/.cache/marimba`.
    ///
    /// # Errors
    /// [`KernelError::Missing`] without NVRTC.
    pub fn new(arch: &str) -> Result<Self, KernelError> {
        Self::probe()?;
        Ok(Compiler {
            arch: arch.to_string(),
            cache: cache_folder().map(|f| f.join("cubin")),
        })
    }

    /// The same without a cache.
    #[must_use]
    pub fn without_cache(mut self) -> Self {
        self.cache = None;
        self
    }

    fn probe() -> Result<(), KernelError> {
        // SAFETY: only tries to open the library.
        if unsafe { sys::is_culib_present() } {
            return Ok(());
        }
        Err(KernelError::Missing {
            library: "libnvrtc",
            looked: looked("libnvrtc.so, libnvrtc.so.13, libnvrtc.so.12"),
            hint: "it comes with the CUDA toolkit and the package nvidia-cuda-nvrtc; name its folder in LD_LIBRARY_PATH",
        })
    }

    /// Machine code of modules, compiled on all cores; `progress` hears how many are not in the cache.
    pub(crate) fn cubins(
        &self,
        modules: &[&Module],
        mut progress: impl FnMut(&str),
    ) -> Vec<Result<Vec<u8>, KernelError>> {
        let missing = |m: &&&Module| !self.file(m).is_some_and(|f| f.exists());
        let missing = modules.iter().filter(missing).count();
        if missing > 0 {
            let plural = if missing == 1 { "" } else { "s" };
            progress(&format!(
                "compiling {missing} kernel{plural} for {}, once on this machine",
                self.arch
            ));
        }
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(missing.max(1));
        let next = AtomicUsize::new(0);
        let mut done: Vec<(usize, _)> = std::thread::scope(|scope| {
            let work = || {
                let mut mine = Vec::new();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(m) = modules.get(i) else { return mine };
                    mine.push((i, self.cubin(m)));
                }
            };
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut all = work();
            // A thread that panicked did so inside the compiler; its modules are compiled again below.
            all.extend(others.into_iter().filter_map(|t| t.join().ok()).flatten());
            all
        });
        done.sort_by_key(|(i, _)| *i);
        let mut done = done.into_iter().peekable();
        (0..modules.len())
            .map(|i| match done.next_if(|(k, _)| *k == i) {
                Some((_, cubin)) => cubin,
                None => self.cubin(modules[i]),
            })
            .collect()
    }

    fn file(&self, module: &Module) -> Option<PathBuf> {
        self.cache.as_ref().map(|f| f.join(self.key(module)))
    }

    /// Machine code of a module.
    ///
    /// # Errors
    /// [`KernelError::Compile`].
    pub fn cubin(&self, module: &Module) -> Result<Vec<u8>, KernelError> {
        let file = self.file(module);
        if let Some(bytes) = file.as_ref().and_then(|f| std::fs::read(f).ok())
            && bytes.starts_with(b"\x7fELF")
        {
            return Ok(bytes);
        }
        let bytes = self.compile(module)?;
        // A cache that cannot be written costs time, not the run.
        if let Some(file) = file
            && let Some(folder) = file.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            // Several engines of a process may compile the same module at the same time.
            static WRITTEN: AtomicUsize = AtomicUsize::new(0);
            let nth = WRITTEN.fetch_add(1, Ordering::Relaxed);
            let part = file.with_extension(format!("{}-{nth}.part", std::process::id()));
            if std::fs::write(&part, &bytes).is_ok() && std::fs::rename(&part, &file).is_err() {
                let _ = std::fs::remove_file(&part);
            }
        }
        Ok(bytes)
    }

    /// File name in the cache: a hash of source, defines, architecture and compiler.
    fn key(&self, module: &Module) -> String {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write to; the library is there.
        unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        let mut hash = Sha256::new();
        hash.update(format!(
            "{} {major}.{minor}\n{:?}\n",
            self.arch, module.defines
        ));
        hash.update(HEAD);
        hash.update(module.source.as_bytes());
        let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("{}-{hex}.cubin", module.stem)
    }

    fn compile(&self, module: &Module) -> Result<Vec<u8>, KernelError> {
        let failed = |log: String| KernelError::Compile {
            stem: module.stem,
            arch: self.arch.clone(),
            log,
        };
        let source = CString::new(format!("{HEAD}{}", module.source))
            .map_err(|_| failed("the source holds a zero byte".into()))?;
        let mut options = vec![
            format!("--gpu-architecture={}", self.arch),
            "--std=c++17".to_string(),
        ];
        options.extend(module.defines.iter().map(|(n, v)| format!("-D{n}={v}")));
        let program = nvrtc::create_program(&source, None).map_err(|e| failed(e.to_string()))?;
        // SAFETY: the program was made above and is destroyed once, below.
        let result = unsafe {
            match nvrtc::compile_program(program, &options) {
                Ok(()) => cubin(program).map_err(|e| e.to_string()),
                Err(e) => {
                    let log = nvrtc::get_program_log(program).unwrap_or_default();
                    let text: String = log
                        .iter()
                        .take_while(|&&c| c != 0)
                        .map(|&c| char::from(c as u8))
                        .collect();
                    Err(format!("{e}: {text}"))
                }
            }
        };
        // SAFETY: as above.
        let _ = unsafe { nvrtc::destroy_program(program) };
        result.map_err(failed)
    }
}

/// # Safety
/// The program was compiled.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut size = 0;
    // SAFETY: the size is asked for first, and as much memory given.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut bytes = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()).result()?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{STEMS, source};
    use std::borrow::Cow;

    fn module(stem: &'static str, text: &'static str, types: &str) -> Module {
        let slots = (0..11)
            .map(|i| format!("TA{i}"))
            .chain((0..8).map(|i| format!("TR{i}")));
        Module {
            stem,
            source: Cow::Borrowed(text),
            defines: match types {
                "" => Vec::new(),
                t => slots.map(|s| (s, t.to_string())).collect(),
            },
        }
    }

    /// What launchers define besides types: forms of a source that its defaults leave out.
    fn forms(stem: &str) -> &'static [&'static str] {
        match stem {
            "ssd" => &[
                "",
                "TILED VEC Q=64 NN=128 PS=64 HEADS=2 R=128 WALKERS=128",
                "TILED VEC=0 Q=32 NN=256 PS=64 HEADS=1 R=64 WALKERS=128",
                "TILED GRADS VEC Q=64 NN=128 PS=64 HEADS=2 R=128 PP=64 STAGES=2 WALKERS=128 GRADERS=256",
                "TILED GRADS VEC=0 Q=32 NN=256 PS=64 HEADS=1 R=64 PP=64 STAGES=1 WALKERS=128 GRADERS=256",
            ],
            "gated_delta" => &[
                "",
                "TILED VEC Q=64 NN=128 PB=64",
                "TILED GRADS VEC Q=64 NN=128 PB=64 PP=64 STAGES=2",
                "TILED GRADS VEC=0 Q=32 NN=256 PB=32 PP=32 STAGES=1",
            ],
            "attention" => &["", "WARPS WHOLE P=256", "WARPS P=33"],
            "attention_step" => &[
                "P=33 ROWS=8",
                "WARPS=4 P=80 ROWS=8",
                "WARPS=4 P=256 ROWS=16",
            ],
            "linear_few" => &[
                "TILES=1 COLUMNS=1 WARPS=16 DEPTH=2",
                "TILES=1 COLUMNS=2 WARPS=8 DEPTH=2 HOLD=3 BOTH=1 FIXED",
            ],
            "moe" => &["", "WARPS WHOLE", "WARPS"],
            "linear_cross_entropy" => &["", "TL=bf16 TA0=bf16"],
            "fp8" => &["", "WHOLE", "E5M2", "E5M2 WHOLE"],
            "selective_scan" => &["", "VEC EVEN", "FINE=16", "VEC FINE=64"],
            "causal_conv1d" => &["", "V=4 ACT=1", "V=8"],
            "rms_norm" => &["", "TEAM=512 GATE=1 STAGES=2", "TEAM=128 NV=2 ADDED=1"],
            _ => &[""],
        }
    }

    /// Without a GPU too: NVRTC alone is needed.
    #[test]
    fn all_kernels_compile_for_four_architectures() {
        if let Err(e) = Compiler::new("sm_80") {
            eprintln!("skipped: {e}");
            return;
        }
        let all = |arch: &str, types: &str| {
            let compiler = Compiler::new(arch).unwrap().without_cache();
            for &stem in STEMS {
                let tensor: &[&str] = match (stem, arch) {
                    ("attention", "sm_90a") => &[
                        "TENSOR P=80 SUMS",
                        "TENSOR P=64 SUMS",
                        "TENSOR P=64",
                        "TENSOR P=256",
                    ],
                    ("moe", "sm_90a") => &["TENSOR"],
                    ("ssd", "sm_90a") => &[
                        "TILED WG VEC Q=64 NN=128 PS=64 HEADS=2 R=128 WALKERS=384 TILE_STAGES=3 WALK_STAGES=4",
                        "TILED WG VEC=0 Q=64 NN=64 PS=64 HEADS=1 R=64 WALKERS=256 TILE_STAGES=3 WALK_STAGES=4",
                        "TILED WG GRADS VEC Q=64 NN=128 PS=64 HEADS=2 R=128 STAGES=3 WALKERS=384 GRADERS=384",
                        "TILED WG GRADS VEC=0 Q=64 NN=64 PS=64 HEADS=1 R=64 STAGES=3 WALKERS=256 GRADERS=384",
                    ],
                    _ => &[],
                };
                for form in forms(stem).iter().chain(tensor) {
                    let mut module = module(stem, source(stem), types);
                    module.defines.extend(form.split_whitespace().map(|d| {
                        let (name, value) = d.split_once('=').unwrap_or((d, "1"));
                        (name.to_string(), value.to_string())
                    }));
                    let image = compiler.cubin(&module);
                    assert!(
                        image.unwrap().starts_with(b"\x7fELF"),
                        "{stem} {arch} {form}"
                    );
                }
            }
        };
        std::thread::scope(|s| {
            for (arch, types) in [
                ("sm_80", ""),
                ("sm_89", "bf16"),
                ("sm_90a", "bf16"),
                ("sm_100", ""),
            ] {
                s.spawn(move || all(arch, types));
            }
        });
    }

    #[test]
    fn what_does_not_compile_is_told_with_the_compilers_words() {
        let Ok(compiler) = Compiler::new("sm_90a") else {
            eprintln!("skipped: NVRTC is not here");
            return;
        };
        let e = compiler
            .without_cache()
            .cubin(&module("broken", "KERNEL k() { nonsense; }", ""));
        assert!(e.unwrap_err().to_string().contains("nonsense"));
    }
}
