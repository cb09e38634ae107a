//! Initial parameters. Each parameter draws from its own stream, keyed by the run's seed and its name, so that neither the order of
//! parameters nor the backend changes them.

use crate::data::rng::{self, Rng};
use marimba_ir::{Param, ParamInit};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// Draws the parameter of a run with this seed.
pub fn init(param: &Param, seed: u64) -> Vec<f32> {
    let n = param.ty.len();
    let mut rng = Rng::new(&[seed, rng::name(&param.name)]);
    let mut draw =
        |f: &mut dyn FnMut(&mut Rng) -> f64| (0..n).map(|_| f(&mut rng) as f32).collect();
    match param.init {
        ParamInit::Zeros => vec![0.0; n],
        ParamInit::Ones => vec![1.0; n],
        ParamInit::Normal(std) => draw(&mut |r| normal(r) * std),
        ParamInit::Uniform(bound) => draw(&mut |r| (2.0 * r.unit() - 1.0) * bound),
        ParamInit::LogUniformA(low, high) => draw(&mut |r| (low + (high - low) * r.unit()).ln()),
        ParamInit::LogArange => {
            let last = param.ty.last().max(1);
            (0..n)
                .map(|i| ((i % last + 1) as f64).ln() as f32)
                .collect()
        }
        ParamInit::DtBias { min, max, floor } => draw(&mut |r| {
            let dt = (min.ln() + (max.ln() - min.ln()) * r.unit())
                .exp()
                .max(floor);
            // Inverse of softplus: ln(e^dt - 1), without cancellation for small dt.
            dt + (-(-dt).exp_m1()).ln()
        }),
    }
}

/// Draws all parameters on these threads and hands them over in their order.
///
/// # Errors
/// The first that `take` gives; nothing is handed over after it.
pub fn init_all<E>(
    params: &[Param],
    seed: u64,
    threads: usize,
    mut take: impl FnMut(&Param, Vec<f32>) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads.clamp(1, params.len().max(1));
    if threads == 1 {
        return params.iter().try_for_each(|p| take(p, init(p, seed)));
    }
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        for _ in 0..threads {
            let send = send.clone();
            let (next, done) = (&next, &done);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(p) = params.get(i) else { return };
                    // What waits for its turn is memory: no more than a few parameters a thread.
                    while i > done.load(Ordering::Relaxed) + 4 * threads {
                        std::thread::sleep(std::time::Duration::from_micros(200));
                    }
                    if send.send((i, init(p, seed))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        let mut early = BTreeMap::new();
        for (i, data) in receive {
            early.insert(i, data);
            while let Some(data) = early.remove(&done.load(Ordering::Relaxed)) {
                let at = done.load(Ordering::Relaxed);
                let result = take(&params[at], data);
                done.store(
                    if result.is_ok() {
                        at + 1
                    } else {
                        usize::MAX / 2
                    },
                    Ordering::Relaxed,
                );
                result?;
            }
        }
        Ok(())
    })
}

/// Box and Muller; one number a draw keeps streams independent of pairing.
fn normal(rng: &mut Rng) -> f64 {
    let u = 1.0 - rng.unit();
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * rng.unit()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use marimba_ir::{DType, Type, dims};

    fn param(init: ParamInit) -> Param {
        let ty = Type::f32(dims![I 100, N 50]);
        Param {
            name: "p".into(),
            ty,
            compute: DType::F32,
            init,
            decay: true,
            trainable: true,
            active: (1, 1),
            path: String::new(),
        }
    }

    #[test]
    fn moments_and_ranges_are_as_declared() {
        let x = init(&param(ParamInit::Normal(0.5)), 1);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / x.len() as f32;
        assert!(
            mean.abs() < 0.03 && (var.sqrt() - 0.5).abs() < 0.02,
            "{mean} {var}"
        );

        let a = init(&param(ParamInit::LogUniformA(1.0, 16.0)), 1);
        assert!(a.iter().all(|v| (0.0..=16f32.ln()).contains(v)));
        assert!(a.iter().any(|v| v.exp() > 15.0) && a.iter().any(|v| v.exp() < 2.0));

        let dt = init(
            &param(ParamInit::DtBias {
                min: 1e-3,
                max: 0.1,
                floor: 1e-4,
            }),
            1,
        );
        let softplus = |v: f32| f64::from(v).exp().ln_1p();
        assert!(
            dt.iter()
                .all(|&v| (0.999e-3..0.1001).contains(&softplus(v)))
        );

        let arange = init(&param(ParamInit::LogArange), 1);
        assert_eq!((arange[0], arange[49], arange[50]), (0.0, 50f32.ln(), 0.0));
    }

    #[test]
    fn threads_change_nothing_and_errors_end_it() {
        let params: Vec<Param> = (0..40)
            .map(|i| Param {
                name: format!("p{i}"),
                ty: Type::f32(dims![I 1 + 97 * (i % 5), N 3]),
                ..param(ParamInit::Normal(1.0))
            })
            .collect();
        let all = |threads| {
            let mut seen = Vec::new();
            init_all(&params, 3, threads, |p, x| {
                seen.push((p.name.clone(), x));
                Ok::<(), ()>(())
            })
            .map(|()| seen)
        };
        let one = all(1).unwrap();
        assert_eq!(one.len(), 40);
        assert_eq!(one, all(3).unwrap());
        let mut n = 0;
        let ended = init_all(&params, 3, 3, |_, _| {
            n += 1;
            if n < 5 { Ok(()) } else { Err("full") }
        });
        assert_eq!((ended, n), (Err("full"), 5));
    }

    #[test]
    fn streams_depend_on_seed_and_name_only() {
        let p = param(ParamInit::Normal(1.0));
        assert_eq!(init(&p, 7), init(&p, 7));
        assert_ne!(init(&p, 7), init(&p, 8));
        assert_ne!(
            init(&p, 7),
            init(
                &Param {
                    name: "q".into(),
                    ..p.clone()
                },
                7
            )
        );
    }
}
