//! Times kernels on a GPU, next to the ceilings of that GPU measured in the same run, and checks them in the same run too: each case is
//! run once in f32 and once in bf16 on a smaller shape, and the results compared. The f32 kernels are the simple ones, which the device
//! tests compare with f64 loops.
//!
//! `cargo run --release --example bench -- [--case PART]... [--seconds S] [--json FILE] [--sources DIR] [--target device|fixed|any]`
//!
//! `--target fixed` times the kernels that add in a fixed order, `any` those for any device.
//!
//! `--sources` names a folder of variants, a development aid: `DIR/STEM@NAME.cu` takes the place of the source of `STEM` in one more run
//! of each case that uses it. Lines `//!define NAME VALUE` in it add defines; `//!launch FUNCTION [grid=X,Y,Z] [block=N] [shared=N]`
//! changes launches.

#![allow(unsafe_code)] // memory of the device

mod attention;
mod elementwise;
mod experts;
mod harness;
mod head;
mod scans;

use harness::{Case, Run};
use std::error::Error;
use std::path::PathBuf;

/// What was asked for.
#[derive(Default)]
struct Options {
    cases: Vec<String>,
    seconds: Option<f64>,
    json: Option<PathBuf>,
    sources: Option<PathBuf>,
    target: Option<String>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut o = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args
            .next()
            .ok_or_else(|| format!("{name} has no value; name one after it"))?;
        match name.as_str() {
            "--case" => o.cases.push(value),
            "--seconds" => o.seconds = Some(value.parse()?),
            "--json" => o.json = Some(value.into()),
            "--sources" => o.sources = Some(value.into()),
            "--target" => o.target = Some(value),
            _ => {
                return Err(format!(
                    "no option {name}; there are --case, --seconds, --json, --sources and --target"
                )
                .into());
            }
        }
    }
    Ok(o)
}

fn main() -> Result<(), Box<dyn Error>> {
    let o = options()?;
    let mut cases: Vec<Case> = Vec::new();
    cases.extend(attention::cases());
    cases.extend(elementwise::cases());
    cases.extend(experts::cases());
    cases.extend(head::cases());
    cases.extend(scans::cases());
    let names: Vec<String> = cases.iter().map(|c| c.name.clone()).collect();
    if !o.cases.is_empty() {
        cases.retain(|c| o.cases.iter().any(|part| c.name.contains(part.as_str())));
    }
    if cases.is_empty() {
        return Err(format!("no case of that name; there are {}", names.join(", ")).into());
    }
    let mut run = Run::new(
        o.seconds.unwrap_or(0.5),
        o.sources.as_deref(),
        o.target.as_deref().unwrap_or("device"),
    )?;
    for case in &cases {
        run.case(case)?;
    }
    run.table();
    if let Some(file) = o.json {
        std::fs::write(file, run.json())?;
    }
    match run.failed() {
        0 => Ok(()),
        n => Err(format!("{n} results are wrong; see the column error").into()),
    }
}
