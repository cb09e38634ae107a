//! The quality of an order as a picture: how far documents move, and what follows what.
//!
//! Left: displacements `(order[i] - i) / n` with the triangle of an ideal shuffle. Right: each document against the one after it; an ideal
//! shuffle fills the square evenly, a linear congruential order draws lines.

use super::DataError;
use super::order::displacement_histogram;
use plotters::prelude::*;
use std::path::Path;

const BINS: usize = 50;

/// Points drawn at most on the right.
const POINTS: usize = 4_000;

/// Draws the two figures of `order` side by side as SVG at `path`.
///
/// # Errors
/// [`DataError::Parameter`] for fewer than two documents, and for a picture that cannot be drawn or written.
pub fn draw_order(order: &[u64], title: &str, path: &Path) -> Result<(), DataError> {
    if order.len() < 2 {
        return Err(DataError::Parameter(format!(
            "an order of {} documents has no picture; expected 2 or more",
            order.len()
        )));
    }
    let failed = |e: &dyn std::fmt::Display| {
        DataError::Parameter(format!("cannot draw {}: {e}", path.display()))
    };
    let svg = svg(order, title).map_err(|e| failed(&e))?;
    std::fs::write(path, svg).map_err(DataError::io("write", path))
}

fn svg(order: &[u64], title: &str) -> Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (1000, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, right) = root
            .titled(title, ("sans-serif", 20))?
            .split_horizontally(500);
        let n = order.len() as f64;

        let width = 2.0 / BINS as f64;
        let density: Vec<f64> = displacement_histogram(order, BINS)
            .iter()
            .map(|&c| c as f64 / n / width)
            .collect();
        let top = density.iter().copied().fold(1.0, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(&left)
            .caption("displacement / n", ("sans-serif", 14))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(40)
            .build_cartesian_2d(-1.0..1.0, 0.0..top)?;
        chart.configure_mesh().disable_mesh().draw()?;
        let bars = density.iter().enumerate().map(|(i, &d)| {
            let x = -1.0 + i as f64 * width;
            Rectangle::new([(x, 0.0), (x + width, d)], BLUE.mix(0.5).filled())
        });
        chart.draw_series(bars)?;
        chart.draw_series(LineSeries::new([(-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)], &RED))?;

        let mut chart = ChartBuilder::on(&right)
            .caption("document against the next one", ("sans-serif", 14))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..n, 0.0..n)?;
        chart.configure_mesh().disable_mesh().draw()?;
        let pairs = order
            .windows(2)
            .take(POINTS)
            .map(|w| Circle::new((w[0] as f64, w[1] as f64), 1, BLUE.filled()));
        chart.draw_series(pairs)?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::super::order::{OrderMode, order};
    use super::*;

    #[test]
    fn both_figures_are_drawn() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("order.svg");
        let o = order(OrderMode::FmsV1, 500, 1, 0, 0, 0).expect("small");
        draw_order(&o, "fms_v1", &path).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("written");
        assert!(text.matches("<circle").count() == 499 && text.matches("<rect").count() > 20);
        assert!(draw_order(&o[..1], "one", &path).is_err());
    }
}
