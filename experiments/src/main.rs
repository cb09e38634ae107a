//! The marimba binary.
fn main() {}
