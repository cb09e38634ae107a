//! Which direction of a metric is good.

use serde::{Deserialize, Serialize};

/// Which direction of a metric is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Accuracy, score.
    Higher,
    /// Loss, error.
    Lower,
}

impl Goal {
    /// By the words of a tag; `None` where they say nothing.
    pub fn of_tag(tag: &str) -> Option<Goal> {
        const LOWER: [&str; 9] = [
            "loss",
            "ppl",
            "perplexity",
            "error",
            "bpb",
            "nll",
            "mse",
            "mae",
            "bits_per",
        ];
        const HIGHER: [&str; 11] = [
            "acc",
            "recall",
            "score",
            "f1",
            "bleu",
            "rouge",
            "precision",
            "exact",
            "per_sec",
            "tps",
            "mfu",
        ];
        let tag = tag.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|w| tag.contains(w));
        if has(&LOWER) {
            Some(Goal::Lower)
        } else if has(&HIGHER) {
            Some(Goal::Higher)
        } else {
            None
        }
    }

    /// Whether `a` is strictly better than `b`; false where either is NaN.
    pub fn better(self, a: f64, b: f64) -> bool {
        match self {
            Goal::Higher => a > b,
            Goal::Lower => a < b,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_tags() {
        assert_eq!(Goal::of_tag("eval/Accuracy"), Some(Goal::Higher));
        assert_eq!(Goal::of_tag("train/loss/ce"), Some(Goal::Lower));
        assert_eq!(Goal::of_tag("train/lr"), None);
        assert!(Goal::Lower.better(1.0, 2.0) && !Goal::Higher.better(f64::NAN, 2.0));
    }
}
