//! Change of element type. All is f32 on a CPU (the engine refuses other float types when it loads a program), so this copies.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op::Cast;

/// `y = x`.
pub(super) fn cast(_: &Cast, a: &Args, r: &mut Results, _: &Cx) {
    r.take_f(0).copy_from_slice(a.f(0));
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{DType, Type, dims};

    #[test]
    fn copies() {
        let x = randn(1, 63);
        let y = run(Cast { to: DType::F32 }, &[f(Type::f32(dims![X 63]), &x)]);
        assert_eq!(floats(&y[0]), &x[..]);
    }
}
