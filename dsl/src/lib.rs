//! RON text to checked models, runs and sweeps.
pub mod model;
