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
    let norm = DtBcNorm {
        eps: c.float("mixer_rms_eps"),
        weighted: false,
    };
    mamba::read_with(c, Some(norm))
}

fn write(m: &Model) -> Written {
    mamba::write_with(m, &FAMILY)
}
