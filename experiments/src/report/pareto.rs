//! Points that no other point beats.

use super::stats::Goal;

/// Whether each point is on the Pareto front: no other is at least as good in every goal and better in one. A point
/// with a value that is not finite is never on it. Equal points are on it together.
pub fn front(points: &[Vec<f64>], goals: &[Goal]) -> Vec<bool> {
    let usable = |p: &[f64]| p.len() == goals.len() && p.iter().all(|v| v.is_finite());
    let dominates = |a: &[f64], b: &[f64]| {
        let better = |(goal, (x, y)): (&Goal, (&f64, &f64))| match goal {
            Goal::Higher => x.partial_cmp(y),
            Goal::Lower => y.partial_cmp(x),
        };
        let orders: Vec<_> = goals
            .iter()
            .zip(a.iter().zip(b))
            .filter_map(better)
            .collect();
        orders.iter().all(|o| o.is_ge()) && orders.iter().any(|o| o.is_gt())
    };
    points
        .iter()
        .map(|p| usable(p) && !points.iter().any(|q| usable(q) && dominates(q, p)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_case_by_hand() {
        let points = [
            vec![0.9, 10.0],
            vec![0.8, 5.0],
            vec![0.8, 7.0],
            vec![f64::NAN, 1.0],
            vec![0.9, 10.0],
        ];
        assert_eq!(
            front(&points, &[Goal::Higher, Goal::Lower]),
            [true, true, false, false, true]
        );
        assert!(front(&[], &[Goal::Lower]).is_empty());
    }

    proptest! {
        #[test]
        fn every_point_off_the_front_is_beaten_by_one_on_it(
            points in proptest::collection::vec((0i32..6, 0i32..6), 1..30)
        ) {
            let points: Vec<Vec<f64>> = points.iter().map(|(a, b)| vec![f64::from(*a), f64::from(*b)]).collect();
            let on = front(&points, &[Goal::Higher, Goal::Lower]);
            prop_assert!(on.iter().any(|o| *o));
            for (p, _) in points.iter().zip(&on).filter(|(_, o)| !**o) {
                prop_assert!(points.iter().zip(&on).any(|(q, o)| *o && q[0] >= p[0] && q[1] <= p[1] && q != p));
            }
        }
    }
}
