//! Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752, figure 3): project, convolve, project to dt, B and C, scan with gate, project.

use super::{Cx, output_init};
use crate::op::{Concat, Gate, RmsNorm, SelectiveScan, Split};
use crate::{Letter, ParamInit, Type, TypeError, ValueId, dims};
use marimba_dsl::model::{DtBcNorm, Mamba1 as Spec};

/// Tokens between saved states of the scan.
const CHUNK: usize = 32;

/// Parameters below `w`: `in_proj [I+I, D]` in the order x, z; `conv [I, K]`; for each of the M heads `x_proj [M*(R+N+N), I/M]` in the
/// order dt, B, C and `dt_proj [I, R]`; `dt_bias d [I]`; `a_log [I, N]`; `dt_norm b_norm c_norm`; `out_proj [D, I]`. States: `conv ssm`.
pub(super) fn lower(
    cx: &mut Cx,
    w: &str,
    state: &str,
    spec: &Spec,
    u: ValueId,
) -> Result<ValueId, TypeError> {
    let (i, n, r, m, d) = (
        spec.d_inner,
        spec.d_state,
        spec.dt_rank,
        spec.n_heads,
        cx.model().d_model,
    );
    let head = i / m;

    let in_proj = cx.matrix(
        &format!("{w}.in_proj"),
        dims![I 2 * i],
        dims![D d],
        cx.normal(),
    );
    let bias = spec.in_proj_bias.then(|| {
        cx.vector(
            &format!("{w}.in_proj.bias"),
            dims![I 2 * i],
            ParamInit::Zeros,
        )
    });
    let x = cx.section(u, in_proj, bias, 0, i)?;
    let z = cx.section(u, in_proj, bias, i, i)?;

    let bound = 1.0 / (spec.d_conv as f64).sqrt();
    let taps = cx.matrix_f32(
        &format!("{w}.conv"),
        dims![I i, K spec.d_conv],
        ParamInit::Uniform(bound),
    );
    let tap_bias = spec.conv_bias.then(|| {
        cx.vector(
            &format!("{w}.conv.bias"),
            dims![I i],
            ParamInit::Uniform(bound),
        )
    });
    let x = cx.causal_conv1d(&format!("{state}.conv"), x, (taps, tap_bias), 0)?;

    // x_proj and dt_proj, one per head over its own channels.
    let x_proj = cx.matrix(
        &format!("{w}.x_proj"),
        dims![N m * (r + 2 * n)],
        dims![I head],
        cx.normal(),
    );
    let dt_proj = cx.matrix(
        &format!("{w}.dt_proj"),
        dims![I i],
        dims![X r],
        ParamInit::Uniform((r as f64).powf(-0.5)),
    );
    let xs = if m == 1 {
        vec![x]
    } else {
        cx.push(
            Split {
                sizes: dims![I head].repeat(m),
            },
            vec![Some(x)],
        )?
    };
    let (mut dts, mut bs, mut cs) = (Vec::new(), Vec::new(), Vec::new());
    for (k, &xh) in xs.iter().enumerate() {
        // One product that is split by copying costs less than three that each read x and make its gradient.
        let narrow = cx.section(xh, x_proj, None, k * (r + 2 * n), r + 2 * n)?;
        let sizes = dims![N r, N n, N n].to_vec();
        let parts = cx.push(Split { sizes }, vec![Some(narrow)])?;
        let (dt, b, c) = (parts[0], parts[1], parts[2]);
        let dt = inner_norm(cx, &format!("{w}.dt_norm"), spec.dt_bc_norm, dt)?;
        dts.push(Some(cx.section(dt, dt_proj, None, k * head, head)?));
        bs.push(Some(inner_norm(
            cx,
            &format!("{w}.b_norm"),
            spec.dt_bc_norm,
            b,
        )?));
        cs.push(Some(inner_norm(
            cx,
            &format!("{w}.c_norm"),
            spec.dt_bc_norm,
            c,
        )?));
    }
    let dt = join(cx, dts, Letter::I)?;
    let (b, c) = (join(cx, bs, Letter::N)?, join(cx, cs, Letter::N)?);
    let (b, c) = (
        cx.retail(b, dims![G m, N n])?,
        cx.retail(c, dims![G m, N n])?,
    );

    let dt_init = ParamInit::DtBias {
        min: spec.dt_init.min,
        max: spec.dt_init.max,
        floor: spec.dt_init.floor,
    };
    let dt_bias = cx.vector(&format!("{w}.dt_bias"), dims![I i], dt_init);
    let a_log = cx.vector(&format!("{w}.a_log"), dims![I i, N n], ParamInit::LogArange);
    let a = cx.neg_exp(a_log)?;
    let skip = cx.vector(&format!("{w}.d"), dims![I i], ParamInit::Ones);

    let pos = cx.pos();
    let batch = cx.options().batch;
    let ssm = format!("{state}.ssm");
    let carried = cx.state(&ssm, Type::f32(dims![B batch, I i, N n]));
    let args = vec![
        Some(x),
        Some(dt),
        Some(a),
        Some(b),
        Some(c),
        Some(skip),
        Some(dt_bias),
        Some(z),
        Some(pos),
        carried,
    ];
    let y = cx.push(SelectiveScan { chunk: CHUNK }, args)?;
    if carried.is_some() {
        cx.keep_state(&ssm, y[1]);
    }
    let init = output_init(cx);
    cx.linear(
        &format!("{w}.out_proj"),
        y[0],
        dims![D d],
        init,
        spec.out_proj_bias,
    )
}

/// RMS norm over dt, B or C, with or without a weight.
fn inner_norm(
    cx: &mut Cx,
    name: &str,
    norm: Option<DtBcNorm>,
    x: ValueId,
) -> Result<ValueId, TypeError> {
    let Some(norm) = norm else { return Ok(x) };
    let last = cx.ty(x).dims[2];
    let weight = norm
        .weighted
        .then(|| cx.vector(name, vec![last], ParamInit::Ones));
    let op = RmsNorm {
        eps: norm.eps,
        group: last.size,
        zero_centered: false,
        gate: Gate::None,
    };
    cx.push1(op, vec![Some(x), weight, None])
}

/// One value of several heads' parts.
fn join(cx: &mut Cx, parts: Vec<Option<ValueId>>, letter: Letter) -> Result<ValueId, TypeError> {
    match parts[..] {
        [Some(one)] => Ok(one),
        _ => cx.push1(Concat { letter }, parts),
    }
}
