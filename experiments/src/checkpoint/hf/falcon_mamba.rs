//! Falcon-Mamba: Mamba with weightless RMS norms on dt, B and C.

use super::config::Config;
use super::{Family, Written, mamba};
use marimba_dsl::model::{DtBcNorm, Model};

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "falcon_mamba",
    architecture: "FalconMambaForCausalLM",
    read,
    write,
    rules: mamba::rules,
};

fn read(c: &Config) -> Model {
    // The published 7B carries `expand: 16` beside the true `intermediate_size: 8192`.
    let expanded = (c.float_or("expand", 2.0) * c.count("hidden_size") as f64) as usize;
    let inner = c.opt_count("intermediate_size").unwrap_or(expanded);
    let norm = DtBcNorm {
        eps: c.float_or("mixer_rms_eps", 1e-6),
        weighted: false,
    };
    mamba::read_with(c, inner, Some(norm))
}

fn write(m: &Model) -> Written {
    mamba::write_with(m, &FAMILY)
}
