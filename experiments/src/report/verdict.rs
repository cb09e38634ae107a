//! The answer of a comparison in sentences, every one derived from its numbers.

use super::compare::Group;
use super::stats::{Goal, Verdict};
use super::units::{bytes, count, mean_sd};

/// `a, b and c`; beyond six names the number of the rest.
pub(super) fn list(names: &[&str]) -> String {
    const SHOWN: usize = 6;
    match names {
        [] => "none".to_owned(),
        [one] => (*one).to_owned(),
        names if names.len() > SHOWN => {
            format!(
                "{} and {} more",
                names[..SHOWN].join(", "),
                names.len() - SHOWN
            )
        }
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// The answer in sentences, every one derived from the numbers.
pub(super) fn words(
    groups: &[Group],
    metric: Option<&str>,
    goal: Goal,
    reference: Option<&str>,
) -> Vec<String> {
    let Some((metric, reference)) = metric.zip(reference) else {
        return vec!["No run has a metric that could be compared.".to_owned()];
    };
    let Some(base) = groups.iter().find(|g| g.name == reference) else {
        return Vec::new();
    };
    let value = |g: &Group| {
        g.metrics
            .get(metric)
            .and_then(|e| Some(mean_sd(e.mean?, e.sd)))
            .unwrap_or_else(|| "no value".to_owned())
    };
    let n = base.metrics.get(metric).map_or(0, |e| e.n);
    let spread = if n >= 2 {
        format!("mean ± standard deviation over {n} seeds")
    } else {
        "one seed".to_owned()
    };
    let best = groups.first().is_some_and(|g| g.name == reference);
    let mut out = vec![if groups.len() == 1 {
        format!("{reference} reaches {metric} {} ({spread}).", value(base))
    } else if best {
        let most = if goal == Goal::Higher {
            "highest"
        } else {
            "lowest"
        };
        format!(
            "{reference} has the {most} {metric}: {} ({spread}).",
            value(base)
        )
    } else {
        format!(
            "Tested against {reference}, which reaches {metric} {} ({spread}).",
            value(base)
        )
    }];
    let with = |verdict: Verdict, apart: bool| -> Vec<String> {
        groups
            .iter()
            .filter_map(|g| g.test.as_ref().map(|t| (g, t)))
            .filter(|(g, t)| {
                t.verdict == verdict && t.difference.is_some() && is_far(g, base, metric) == apart
            })
            .map(|(g, t)| match t.p_adjusted {
                Some(p) => format!("{} ({}, {})", g.name, value(g), p_words(p)),
                None => format!("{} ({})", g.name, value(g)),
            })
            .collect()
    };
    let mut say = |lead: &str, names: Vec<String>, tail: &str| {
        if !names.is_empty() {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            out.push(format!("{lead}{}{tail}.", list(&names)));
        }
    };
    let both = |verdict| [with(verdict, true), with(verdict, false)].concat();
    say("Better: ", both(Verdict::Better), "");
    say("Worse: ", both(Verdict::Worse), "");
    let far = with(Verdict::NoDifferenceShown, true);
    say(
        "Far apart in these seeds, yet too few seeds to show it by a test: ",
        far,
        "",
    );
    say(
        "No difference shown: ",
        with(Verdict::NoDifferenceShown, false),
        "",
    );
    say(
        "Not tested, since a test needs two seeds on each side: ",
        both(Verdict::NotTested),
        "",
    );
    let undecided = groups
        .iter()
        .filter_map(|g| g.test.as_ref())
        .any(|t| t.verdict == Verdict::NoDifferenceShown);
    if undecided && n < 4 {
        out.push(format!("With {n} seeds a test shows only steady differences; more seeds would settle the open ones."));
    }
    out.extend(cost_words(groups, base, metric, goal));
    out
}

/// Whether a gap is over five times the larger spread: visible to the eye whatever a test with two seeds says.
fn is_far(group: &Group, base: &Group, metric: &str) -> bool {
    let estimates = group.metrics.get(metric).zip(base.metrics.get(metric));
    let Some((a, b)) = estimates else {
        return false;
    };
    match (a.mean, b.mean, a.sd, b.sd) {
        (Some(x), Some(y), Some(s), Some(r)) => (x - y).abs() > 5.0 * s.max(r) && x != y,
        _ => false,
    }
}

/// `p = 0.012`, `p < 0.001`.
pub(super) fn p_words(p: f64) -> String {
    if p < 0.001 {
        "p < 0.001".to_owned()
    } else {
        format!("p = {p:.3}")
    }
}

/// What the reference costs next to groups that are not shown to be worse and not far from it.
fn cost_words(groups: &[Group], base: &Group, metric: &str, goal: Goal) -> Vec<String> {
    let quality = |g: &Group| g.metrics.get(metric).and_then(|e| e.mean);
    let near = groups
        .iter()
        .filter(|g| g.name != base.name && !is_far(g, base, metric))
        .filter(|g| {
            let tied = g
                .test
                .as_ref()
                .is_some_and(|t| matches!(t.verdict, Verdict::NoDifferenceShown | Verdict::Better));
            let ahead = quality(g)
                .zip(quality(base))
                .is_some_and(|(x, y)| if goal == Goal::Higher { x >= y } else { x <= y });
            tied || ahead
        });
    let cheaper = near
        .filter_map(|g| {
            let (mine, theirs) = (g.decode_bytes? as f64, base.decode_bytes? as f64);
            (mine > 0.0 && theirs / mine >= 1.2).then(|| (g, theirs / mine, mine, theirs))
        })
        // Groups come best first: of equal costs the better one is named.
        .rev()
        .max_by(|a, b| a.1.total_cmp(&b.1));
    let mut out = Vec::new();
    if let Some((g, ratio, mine, theirs)) = cheaper {
        out.push(format!(
            "Among those not shown to be worse than {}, {} needs the least state in decoding: {ratio:.1} times less per sequence ({} against {}).",
            base.name,
            g.name,
            bytes(mine),
            bytes(theirs)
        ));
    }
    let totals: Vec<u64> = groups.iter().filter_map(|g| g.params_active).collect();
    if let (Some(low), Some(high)) = (totals.iter().min(), totals.iter().max())
        && *low > 0
        && (*high as f64 / *low as f64) > 1.1
    {
        out.push(format!(
            "Sizes differ: {} to {} active parameters; part of any difference may be size.",
            count(*low as f64),
            count(*high as f64)
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_well() {
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(list(&["a"; 8]), "a, a, a, a, a, a and 2 more");
    }
}
