//! From a checked run to loaded programs: lower, differentiate, optimise, verify, plan.

use marimba_dsl::model::Model;
use marimba_dsl::run::{ActivationLoss, AdamW, Precision, Recompute, Run, Tap};
use marimba_ir::lower::{Logits, OptimizerConfig, update_scaled};
use marimba_ir::pass::{self, PassError, RecomputePolicy, Taps};
use marimba_ir::{
    DType, Graph, Options, Plan, TypeError, ValueId, VerifyError, differentiate, lower, plan,
    verify,
};
use std::collections::BTreeMap;

/// Input that holds the coefficient of the activation loss.
pub const ACTIVATION_ALPHA: &str = "activation_alpha";

/// A graph and its memory.
#[derive(Clone, Debug)]
pub struct Program {
    /// What runs.
    pub graph: Graph,
    /// Where its values lie.
    pub plan: Plan,
}

/// What can stop a compilation.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A lowering or derivative is wrong.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// A pass broke the graph.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// A pass cannot do what the run asks.
    #[error(transparent)]
    Pass(#[from] PassError),
}

/// What of a run decides its training graph, besides the model and the shape.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Element type of activations and matrices.
    pub compute: DType,
    /// Whether products with projections run in 8 bits where that pays.
    pub fp8: bool,
    /// Coefficient of the squared log-sum-exp.
    pub z_loss: f64,
    /// What the forward pass keeps.
    pub recompute: Recompute,
    /// Penalty on mean-square activations.
    pub activation_loss: Option<ActivationLoss>,
    /// Put out statistics of activations and gradients.
    pub probe: bool,
}

impl TrainOptions {
    /// As the run says, without probes.
    pub fn of(run: &Run) -> Self {
        TrainOptions {
            compute: compute(run.precision),
            fp8: run.precision == Precision::Bf16Fp8,
            z_loss: run.z_loss,
            recompute: run.recompute,
            activation_loss: run.activation_loss.clone(),
            probe: false,
        }
    }

    /// Plain training in f32.
    pub fn plain() -> Self {
        TrainOptions {
            compute: DType::F32,
            fp8: false,
            z_loss: 0.0,
            recompute: Recompute::None,
            activation_loss: None,
            probe: false,
        }
    }
}

/// Element type of activations and matrices in a precision.
pub fn compute(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 | Precision::Bf16Fp8 => DType::Bf16,
    }
}

/// Forward and backward of one micro-batch `[B T]`: inputs `tokens pos targets loss_scale grad_keep` (and `activation_alpha`); outputs
/// `loss nll hit`, `stat:*`; gradients accumulate in their buffers.
///
/// # Errors
/// [`CompileError`]; all but an unreachable memory budget are bugs.
pub fn training(
    model: &Model,
    options: &TrainOptions,
    batch: usize,
    seq_len: usize,
) -> Result<Program, CompileError> {
    let mut graph = lower(
        model,
        &Options {
            compute: options.compute,
            z_loss: options.z_loss,
            ..Options::train(batch, seq_len)
        },
    )?;
    graph.fp8 = options.fp8;
    if let Some(mut loss) = graph.output("loss") {
        if let Some(a) = &options.activation_loss {
            let taps = activation_taps(&graph, &a.taps);
            (graph, loss) = pass::add_activation_loss(&graph, loss, &taps, ACTIVATION_ALPHA)?;
        }
        differentiate(&mut graph, loss)?;
    }
    let policy = match options.recompute {
        Recompute::None => RecomputePolicy::None,
        Recompute::Block => RecomputePolicy::Block,
        Recompute::Budget(bytes) => RecomputePolicy::Budget(bytes as usize),
    };
    let probe = if options.probe { Taps::All } else { Taps::None };
    finish(
        graph,
        pass::Config {
            recompute: policy,
            probe,
            probe_grads: options.probe,
            ..pass::Config::default()
        },
    )
}

/// Number of activations that a penalty looks at.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn count_activation_taps(model: &Model, loss: &ActivationLoss) -> Result<usize, CompileError> {
    Ok(activation_taps(&lower(model, &Options::train(1, 1))?, &loss.taps).len())
}

/// Forward only: inputs `tokens pos targets loss_scale`; outputs `loss nll hit`.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn evaluation(
    model: &Model,
    compute: DType,
    batch: usize,
    seq_len: usize,
) -> Result<Program, CompileError> {
    evaluation_in(model, compute, false, batch, seq_len)
}

/// [`evaluation`], with statistics of all taps (`stat:*`) when asked.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn evaluation_in(
    model: &Model,
    compute: DType,
    probe: bool,
    batch: usize,
    seq_len: usize,
) -> Result<Program, CompileError> {
    let options = Options {
        compute,
        router_loss: false,
        ..Options::train(batch, seq_len)
    };
    let probe = if probe { Taps::All } else { Taps::None };
    finish(
        lower(model, &options)?,
        pass::Config {
            probe,
            ..pass::Config::default()
        },
    )
}

/// Prefill of `seq_len` tokens, or decode when it is 1, with caches of `cache_len` slots.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn inference(
    model: &Model,
    batch: usize,
    seq_len: usize,
    cache_len: usize,
    logits: Logits,
) -> Result<Program, CompileError> {
    let options = if seq_len == 1 {
        Options::decode(batch, cache_len)
    } else {
        Options::prefill(batch, seq_len, cache_len)
    };
    lowered(model, &Options { logits, ..options })
}

/// What these options say, without a backward pass.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn lowered(model: &Model, options: &Options) -> Result<Program, CompileError> {
    finish(lower(model, options)?, pass::Config::default())
}

/// The optimiser step: inputs `lr step`; output `grad_norm`. `lr_scales` are factors on the learning rate by parameter, 1 where not named.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn optimizer(
    params: &[marimba_ir::Param],
    run: &Run,
    lr_scales: &BTreeMap<String, f64>,
) -> Result<Program, CompileError> {
    update_of(params, &run.optimizer, run.grad_clip, lr_scales)
}

/// The optimiser step of these constants; gradients are clipped to the global norm `clip`, and learning rates of parameters scaled.
///
/// # Errors
/// [`CompileError`]: a bug.
pub fn update_of(
    params: &[marimba_ir::Param],
    o: &AdamW,
    clip: Option<f64>,
    lr_scales: &BTreeMap<String, f64>,
) -> Result<Program, CompileError> {
    let config = OptimizerConfig {
        betas: o.betas,
        eps: o.eps,
        weight_decay: o.weight_decay,
        clip,
    };
    let scale = |p: &marimba_ir::Param| lr_scales.get(&p.name).copied().unwrap_or(1.0);
    let graph = update_scaled(params, &config, &scale)?;
    verify(&graph)?;
    let plan = plan(&graph);
    Ok(Program { graph, plan })
}

fn finish(graph: Graph, config: pass::Config) -> Result<Program, CompileError> {
    let graph = pass::run_passes(&graph, &config)?;
    let plan = plan(&graph);
    Ok(Program { graph, plan })
}

/// The activations that kinds of taps mean.
fn activation_taps(graph: &Graph, kinds: &[Tap]) -> Vec<ValueId> {
    let mamba = |path: &str| {
        graph.nodes.iter().any(|n| {
            n.path == path
                && matches!(
                    n.op,
                    marimba_ir::op::Op::Ssd(_) | marimba_ir::op::Op::SelectiveScan(_)
                )
        })
    };
    let wanted = |name: &str, kind: &Tap| match kind {
        Tap::ExpertOut => name.ends_with(".expert_out"),
        Tap::FfnOut => name.ends_with(".ffn.out"),
        Tap::MambaOut => name
            .strip_suffix(".out")
            .is_some_and(|path| path.ends_with(".mixer") && mamba(path)),
        Tap::Residual => name.ends_with("].out"),
    };
    graph
        .taps
        .iter()
        .filter(|(n, _)| kinds.iter().any(|k| wanted(n, k)))
        .map(|(_, v)| *v)
        .collect()
}
