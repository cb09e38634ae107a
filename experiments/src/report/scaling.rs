//! Scaling laws of a comparison: how a loss falls with size, fitted within families of configurations.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::compare::{Cost, Group};
use super::fit::{B_RANGE, Fit, power_law};
use super::stats::Goal;
use super::units::number;

/// A law fitted to the groups of one family.
#[derive(Debug, Clone, Serialize)]
pub struct ScalingLaw {
    /// The family; empty where the runs have none.
    pub family: String,
    /// What the metric is a function of.
    pub cost: Cost,
    /// Smallest and largest size fitted.
    pub range: (f64, f64),
    /// The law.
    pub fit: Fit,
}

impl ScalingLaw {
    /// In words, with the 95% intervals.
    pub fn words(&self, metric: &str) -> String {
        let law = &self.fit.law;
        let [e, _, b] = self.fit.ci95;
        let e = format!("{} to {}", number(e.0), number(e.1));
        // At the end of what was searched the interval has no end.
        let b = if b.1 >= 0.99 * B_RANGE.1 {
            format!("{} and more", number(b.0))
        } else {
            format!("{} to {}", number(b.0), number(b.1))
        };
        let of = if self.family.is_empty() {
            String::new()
        } else {
            format!("{}: ", self.family)
        };
        format!(
            "{of}{metric} = {} + {} x^-{}, x = {}; 95%: floor {e}, exponent {b}; {} points, residual {}",
            number(law.e),
            number(law.a),
            number(law.b),
            self.cost.words(),
            self.fit.n,
            number(self.fit.rmse)
        )
    }
}

/// Resamples of a fit's intervals.
const N_BOOT: usize = 500;
/// A law over less than this factor in size says nothing.
const LEAST_RANGE: f64 = 2.0;

/// Scaling laws of losses over parameters and operations, per family. With them, in sentences, why a family of
/// different sizes has none.
pub(super) fn fit_laws(
    groups: &[Group],
    metric: Option<&str>,
    goal: Goal,
    families: &BTreeMap<String, String>,
) -> (Vec<ScalingLaw>, Vec<String>) {
    let (Some(metric), Goal::Lower) = (metric, goal) else {
        return Default::default();
    };
    let family = |g: &Group| families.get(&g.name).cloned().unwrap_or_default();
    let names: BTreeSet<String> = groups.iter().map(family).collect();
    let (mut laws, mut refused) = (Vec::new(), Vec::new());
    for name in names {
        for cost in [Cost::ParamsActive, Cost::FlopsPerToken] {
            let points: Vec<(f64, f64)> = groups
                .iter()
                .filter(|g| family(g) == name)
                .filter_map(|g| Some((cost.of(g)?, g.metrics.get(metric)?.mean?)))
                .collect();
            let low = points.iter().map(|p| p.0).fold(f64::INFINITY, f64::min);
            let high = points.iter().map(|p| p.0).fold(0.0, f64::max);
            if high < LEAST_RANGE * low {
                continue;
            }
            let why = match power_law(&points, N_BOOT, 0) {
                Ok(fit) if fit.law.a > 0.0 => {
                    laws.push(ScalingLaw {
                        family: name.clone(),
                        cost,
                        range: (low, high),
                        fit,
                    });
                    continue;
                }
                Ok(_) => format!("{metric} does not fall as they grow"),
                Err(e) => e.to_string(),
            };
            let of = if name.is_empty() {
                String::new()
            } else {
                format!(" of {name}")
            };
            refused.push(format!("No scaling law{of} over {}: {why}.", cost.words()));
        }
    }
    (laws, refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{RunState, RunSummary};
    use crate::report::compare::tests::{five_by_two, run};
    use crate::report::{Options, compare};

    #[test]
    fn losses_over_sizes_get_a_law_per_family() {
        let mut runs = Vec::new();
        let mut families = BTreeMap::new();
        for (family, floor) in [("a", 1.0), ("b", 2.0)] {
            for (i, size) in [1e4, 3e4, 1e5, 3e5, 1e6].into_iter().enumerate() {
                let name = format!("{family}-{i}");
                let loss = floor + 40.0 * f64::powf(size, -0.5);
                let mut run = run(&name, 0, &[("eval/loss", loss)]);
                run.summary = Some(RunSummary {
                    name: name.clone(),
                    group: name.clone(),
                    seed: 0,
                    status: RunState::Finished,
                    params_total: size as u64,
                    params_active: size as u64,
                    state_bytes_per_seq: 0,
                    kv_bytes_per_token: 0,
                    seq_len: 1,
                    flops_per_token: 2.0 * size,
                    tokens_per_sec: 1.0,
                    final_metrics: [("eval/loss".to_owned(), loss)].into(),
                    best_metrics: BTreeMap::new(),
                    config_hash: String::new(),
                    graph_hash: String::new(),
                    data_hash: String::new(),
                    axes: BTreeMap::new(),
                });
                runs.push(run);
                families.insert(name, family.to_owned());
            }
        }
        let options = Options {
            families,
            ..Options::default()
        };
        let c = compare(&runs, &options);
        let laws: Vec<_> = c.laws.iter().map(|l| (l.family.as_str(), l.cost)).collect();
        assert_eq!(
            laws,
            [
                ("a", Cost::ParamsActive),
                ("a", Cost::FlopsPerToken),
                ("b", Cost::ParamsActive),
                ("b", Cost::FlopsPerToken)
            ]
        );
        for (law, floor) in c.laws.iter().zip([1.0, 1.0, 2.0, 2.0]) {
            assert!((law.fit.law.e - floor).abs() < 1e-3, "{law:?}");
            assert!((law.fit.law.b - 0.5).abs() < 1e-3, "{law:?}");
        }
        let words = crate::report::table::terminal(&c, 200);
        assert!(
            words.contains("Scaling laws") && words.contains("a: eval/loss = 1.000"),
            "{words}"
        );
        let csv = crate::report::table::laws_csv(&c);
        let lines: Vec<&str> = csv.trim_end().split("\r\n").collect();
        assert_eq!(lines.len(), 1 + 4);
        let cells = |line: &str| line.split(',').map(str::to_owned).collect::<Vec<_>>();
        let (head, law) = (cells(lines[0]), cells(lines[2]));
        let at = |name: &str| &law[head.iter().position(|h| h == name).unwrap()];
        assert_eq!(
            [at("family"), at("metric"), at("x"), at("points")],
            ["a", "eval/loss", "flops_per_token", "5"]
        );
        assert_eq!(at("exponent"), &c.laws[1].fit.law.b.to_string());
        assert_eq!(at("x_high"), "2000000");
        // Equal sizes have no law.
        assert!(compare(&five_by_two(), &Options::default()).laws.is_empty());
        // Too few of them are refused in words, and so is what does not fall.
        runs.retain(|r| !r.name.starts_with("b-") || r.name.as_str() < "b-3");
        for (i, run) in runs
            .iter_mut()
            .filter(|r| r.name.starts_with("a-"))
            .enumerate()
        {
            let metrics = run.summary.as_mut().map(|s| &mut s.final_metrics);
            metrics
                .unwrap()
                .insert("eval/loss".to_owned(), 1.0 + i as f64);
        }
        let c = compare(&runs, &options);
        let notes = c.notes.join("\n");
        for part in [
            "No scaling law of a over active parameters: eval/loss does not fall",
            "No scaling law of b over forward FLOPs per token: a scaling law has three unknowns: 3 different sizes",
        ] {
            assert!(notes.contains(part), "{part} is not in\n{notes}");
        }
        assert!(c.laws.is_empty());
    }
}
