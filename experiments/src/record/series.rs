//! A metric over steps, in bounded memory.

use std::collections::BTreeMap;

/// One recorded value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Training step.
    pub step: i64,
    /// Seconds since 1970.
    pub time: f64,
    /// The value; may be NaN or infinite.
    pub value: f64,
}

/// The values of one tag, steps strictly rising. Holds at most `capacity` points and the last one: beyond that every
/// second point is dropped and the spacing doubled, so the curve keeps its whole range.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    kept: Vec<Point>,
    last: Option<Point>,
    seen: u64,
    stride: u64,
    capacity: usize,
}

/// All series of a run, by tag.
pub type SeriesMap = BTreeMap<String, Series>;

impl Series {
    /// An empty series of at most `capacity` points (at least 2).
    pub fn with_capacity_limit(capacity: usize) -> Series {
        Series {
            kept: Vec::new(),
            last: None,
            seen: 0,
            stride: 1,
            capacity: capacity.max(2),
        }
    }

    /// Appends a point. Points at or after its step are dropped first: a writer whose steps go back has restarted, and
    /// what it wrote before from there on is void (TensorBoard's own rule).
    pub fn push(&mut self, point: Point) {
        if self.last.is_some_and(|l| l.step >= point.step) {
            self.purge_from(point.step);
        }
        if self.seen.is_multiple_of(self.stride) {
            if self.kept.len() == self.capacity {
                let mut index = 0;
                self.kept.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.stride *= 2;
            }
            if self.seen.is_multiple_of(self.stride) {
                self.kept.push(point);
            }
        }
        self.seen += 1;
        self.last = Some(point);
    }

    /// Drops every point at or after `step`.
    pub fn purge_from(&mut self, step: i64) {
        let len = self.kept.partition_point(|p| p.step < step);
        self.kept.truncate(len);
        if self.last.is_some_and(|l| l.step >= step) {
            self.last = self.kept.last().copied();
            self.seen = self.kept.len() as u64 * self.stride;
        }
    }

    /// The points in rising order of step, the last one always included.
    pub fn points(&self) -> impl Iterator<Item = Point> + '_ {
        let tail = self
            .last
            .filter(|l| self.kept.last().is_none_or(|k| k.step != l.step));
        self.kept.iter().copied().chain(tail)
    }

    /// The last point.
    pub fn last(&self) -> Option<Point> {
        self.last
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// Whether points were left out to keep memory bounded.
    pub fn is_thinned(&self) -> bool {
        self.stride > 1
    }
}

impl FromIterator<Point> for Series {
    /// Without a limit on points.
    fn from_iter<I: IntoIterator<Item = Point>>(points: I) -> Series {
        let mut series = Series::with_capacity_limit(usize::MAX);
        points.into_iter().for_each(|p| series.push(p));
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: i64) -> Point {
        Point {
            step,
            time: step as f64,
            value: step as f64,
        }
    }

    #[test]
    fn thins_but_keeps_range_and_last() {
        let mut s = Series::with_capacity_limit(10);
        (0..1001).for_each(|i| s.push(at(i)));
        let steps: Vec<i64> = s.points().map(|p| p.step).collect();
        assert!(steps.len() <= 11 && s.is_thinned());
        assert_eq!((steps[0], *steps.last().unwrap()), (0, 1000));
        assert!(steps.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn a_step_back_voids_what_followed() {
        let s: Series = [1, 2, 3, 4, 3].into_iter().map(at).collect();
        assert_eq!(s.points().map(|p| p.step).collect::<Vec<_>>(), [1, 2, 3]);
        let mut s = s;
        s.purge_from(0);
        assert!(s.is_empty() && s.points().next().is_none());
    }
}
