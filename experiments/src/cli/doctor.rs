//! `marimba doctor`: what this machine has, and what that means for each backend.

use super::{CliError, human_bytes, print_json};
use crate::engine;
use clap::Args;
use marimba_backend::{BackendError, CudaEngine, dfdx};
use serde::Serialize;

/// Say what this machine has.
#[derive(Args)]
#[command(after_help = "Example:\n  marimba doctor --json")]
pub(super) struct DoctorArgs {
    /// Print as JSON on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Library {
    name: &'static str,
    purpose: &'static str,
    found: Option<String>,
    tried: Vec<String>,
}

#[derive(Serialize)]
struct Facts {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    cores: usize,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    simd: Vec<&'static str>,
    gpus: Vec<String>,
    libraries: Vec<Library>,
    backends: Vec<(&'static str, bool, String)>,
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let gpus = gpus();
    let libraries = libraries();
    // The engine's own start is the probe: what it needs, and what it says when that is missing, is known there alone.
    let cuda = CudaEngine::new().map(|e| e.device_name().to_string());
    let auto = "what --backend auto takes here";
    let reference = dfdx::usable();
    let on_gpu = match cfg!(feature = "dfdx-cuda") {
        true => ", on dfdx's own GPU device",
        false => "",
    };
    let facts = Facts {
        version: env!("CARGO_PKG_VERSION"),
        os: std::env::consts::OS,
        arch: std::env::consts::ARCH,
        cores: engine::cores(),
        memory_bytes: meminfo("MemTotal:"),
        available_bytes: meminfo("MemAvailable:"),
        simd: simd(),
        backends: vec![
            (
                "cpu",
                true,
                match cuda {
                    Ok(_) => "native, multi-threaded".to_string(),
                    Err(_) => format!("native, multi-threaded; {auto}"),
                },
            ),
            (
                "dfdx",
                reference.is_ok(),
                match reference {
                    Ok(()) => {
                        format!("the reference: every op composed of dfdx primitives{on_gpu}, slow")
                    }
                    Err(why) => why,
                },
            ),
            (
                "cuda",
                cuda.is_ok(),
                match &cuda {
                    Ok(name) => format!("{name}, in f32 and bf16; {auto}"),
                    Err(BackendError::NoDevice { why, .. }) => why.clone(),
                    Err(e) => e.to_string(),
                },
            ),
        ],
        gpus,
        libraries,
    };
    if args.json {
        return print_json(&facts);
    }
    println!("marimba {} on {} {}", facts.version, facts.os, facts.arch);
    println!("cores      {}", facts.cores);
    let bytes = |b: Option<u64>| b.map_or_else(|| "unknown".to_string(), human_bytes);
    println!(
        "memory     {} ({} available)",
        bytes(facts.memory_bytes),
        bytes(facts.available_bytes)
    );
    println!(
        "SIMD       {}",
        if facts.simd.is_empty() {
            "none beyond the baseline".to_string()
        } else {
            facts.simd.join(" ")
        }
    );
    println!(
        "GPUs       {}",
        if facts.gpus.is_empty() {
            "none seen under /proc/driver/nvidia/gpus".to_string()
        } else {
            facts.gpus.join(", ")
        }
    );
    println!("CUDA libraries (needed by the cuda backend only):");
    for l in &facts.libraries {
        match &l.found {
            Some(path) => println!("  {:16} found at {path}", l.name),
            None => println!(
                "  {:16} not found ({}); looked in {}",
                l.name,
                l.purpose,
                l.tried.join(", ")
            ),
        }
    }
    println!("backends:");
    for (name, available, why) in &facts.backends {
        println!(
            "  {:6} {:13} {why}",
            name,
            if *available {
                "available"
            } else {
                "not available"
            }
        );
    }
    Ok(())
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut found = Vec::new();
        if std::arch::is_x86_feature_detected!("avx2") {
            found.push("avx2");
        }
        if std::arch::is_x86_feature_detected!("fma") {
            found.push("fma");
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            found.push("avx512f");
        }
        found
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

fn gpus() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc/driver/nvidia/gpus") else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|e| {
            let info = std::fs::read_to_string(e.path().join("information")).unwrap_or_default();
            let model = info
                .lines()
                .find_map(|l| l.strip_prefix("Model:"))
                .map(|m| m.trim().to_string());
            model.unwrap_or_else(|| e.file_name().to_string_lossy().into_owned())
        })
        .collect();
    names.sort();
    names
}

fn libraries() -> Vec<Library> {
    let mut folders: Vec<String> = std::env::var("LD_LIBRARY_PATH")
        .unwrap_or_default()
        .split(':')
        .map(str::to_string)
        .collect();
    folders.extend(
        [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
            "/usr/local/cuda/lib64",
            "/usr/local/nvidia/lib64",
            "/usr/lib/aarch64-linux-gnu",
        ]
        .map(str::to_string),
    );
    folders.retain(|f| !f.is_empty());
    let find = |name: &'static str, purpose: &'static str| {
        let found = folders.iter().find_map(|folder| {
            let mut names: Vec<_> = std::fs::read_dir(folder)
                .ok()?
                .flatten()
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .filter(|n| n.starts_with(name))
                .collect();
            names.sort();
            names.first().map(|n| format!("{folder}/{n}"))
        });
        Library {
            name,
            purpose,
            found,
            tried: folders.clone(),
        }
    };
    vec![
        find("libcuda.so", "the driver"),
        find("libnvrtc.so", "compiles kernels"),
        find("libcublasLt.so", "matrix products"),
        find("libnccl.so", "several GPUs"),
    ]
}
