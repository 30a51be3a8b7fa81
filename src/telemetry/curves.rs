//! Curves as PNG: rewards over the iterations, one panel per task, and any other series.
//!
//! plotters maps coordinates and draws lines; ticks and all text are ours (see [`super::text`] for why).

use std::path::Path;

use anyhow::{anyhow, ensure, Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::axis::{tick_style, Axis};
use super::metrics::{names, Metrics};
use super::picture::{save_png, Picture};
use super::text::Style;

/// Size of one panel, title and axes included, in pixels.
const PANEL: (usize, usize) = (560, 420);
/// Panels beside each other.
const PANELS_ACROSS: usize = 3;
const MARGIN: usize = 24;
/// Room for the title of a panel and its legend.
const PANEL_HEAD: usize = 66;

const COLORS: [RGBColor; 6] = [
    RGBColor(31, 99, 181),
    RGBColor(205, 92, 30),
    RGBColor(40, 140, 80),
    RGBColor(140, 80, 170),
    RGBColor(170, 130, 20),
    RGBColor(90, 90, 98),
];

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// What one panel of the reward curves shows.
#[derive(Clone, Debug)]
pub struct RewardPanel {
    /// The curve is `<task>/reward_mean`.
    pub task: String,
    /// Mean reward of the untuned model on the evaluation prompts, drawn as a dashed line.
    pub base: Option<f64>,
}

/// Writes the mean reward of every iteration (thin) with its running mean (thick), one panel per task. Iterations
/// without the metric, or where it is not finite, leave a gap.
pub fn draw_reward_curves(path: &Path, title: &str, history: &[Metrics], panels: &[RewardPanel]) -> Result<()> {
    ensure!(!panels.is_empty(), "{}: no panels to draw", path.display());
    let across = panels.len().min(PANELS_ACROSS);
    let down = panels.len().div_ceil(across);
    let title_style = Style::bold(30.0);
    let title_lines = title_style.wrap(title, across * PANEL.0);
    let head = MARGIN + title_lines.len() * title_style.line_height() + MARGIN / 2;
    let (width, height) = (2 * MARGIN + across * PANEL.0, head + down * PANEL.1 + MARGIN);
    let mut picture = Picture::from_fn(width, height, |_, _| [255; 3]);
    for (index, line) in title_lines.iter().enumerate() {
        title_style.draw(&mut picture, line, MARGIN, MARGIN + index * title_style.line_height());
    }
    for (index, panel) in panels.iter().enumerate() {
        let corner = (MARGIN + index % across * PANEL.0, head + index / across * PANEL.1);
        let series = reward_series(history, panel, COLORS[index % COLORS.len()]);
        let labels = Labels { title: &panel.task, x: "iteration", y: "mean reward of the batch" };
        draw_panel(&mut picture, corner, PANEL, &labels, &series)
            .with_context(|| format!("cannot draw {}", path.display()))?;
    }
    save_png(path, &picture, &[("Title".to_owned(), title.to_owned())])
}

/// A curve.
#[derive(Clone, Debug)]
pub struct Series {
    pub label: String,
    /// (x, y); points that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
    pub dashed: bool,
}

/// Writes any curves into one panel of 900 × 560 pixels.
pub fn plot_series(path: &Path, title: &str, x_label: &str, y_label: &str, series: &[Series]) -> Result<()> {
    const SIZE: (usize, usize) = (900, 560);
    let lines: Vec<_> = series
        .iter()
        .enumerate()
        .map(|(index, series)| Line {
            label: series.label.clone(),
            points: series.points.clone(),
            color: COLORS[index % COLORS.len()],
            width: 2,
            dashed: series.dashed,
        })
        .collect();
    let mut picture = Picture::from_fn(SIZE.0 + 2 * MARGIN, SIZE.1 + 2 * MARGIN, |_, _| [255; 3]);
    let labels = Labels { title, x: x_label, y: y_label };
    draw_panel(&mut picture, (MARGIN, MARGIN), SIZE, &labels, &lines)
        .with_context(|| format!("cannot draw {}", path.display()))?;
    save_png(path, &picture, &[("Title".to_owned(), title.to_owned())])
}

/// A curve with its looks.
struct Line {
    label: String,
    points: Vec<(f64, f64)>,
    color: RGBColor,
    width: u32,
    dashed: bool,
}

struct Labels<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
}

fn reward_series(history: &[Metrics], panel: &RewardPanel, color: RGBColor) -> Vec<Line> {
    let name = names::reward_mean(&panel.task);
    let value = |metrics: &Metrics| metrics.get(&name).unwrap_or(f64::NAN);
    let points: Vec<_> = history.iter().map(|metrics| ((metrics.iteration + 1) as f64, value(metrics))).collect();
    let window = mean_window(points.len());
    let averaged = running_mean(&points, window);
    let pale = RGBColor(pale(color.0), pale(color.1), pale(color.2));
    let line = |label: String, points, color, width, dashed| Line { label, points, color, width, dashed };
    let mut lines = Vec::new();
    if let (Some(base), Some(first), Some(last)) = (panel.base, points.first(), points.last()) {
        // a level must be visible from a single iteration on
        let ends = vec![(first.0.min(last.0 - 1.0), base), (last.0, base)];
        lines.push(line("base".to_owned(), ends, RGBColor(90, 90, 98), 2, true));
    }
    lines.push(line("iteration".to_owned(), points, pale, 1, false));
    lines.push(line(format!("mean of {window}"), averaged, color, 3, false));
    lines
}

fn pale(channel: u8) -> u8 {
    255 - (255 - channel) / 2
}

/// Over how many points the running mean of `count` goes.
pub(crate) fn mean_window(count: usize) -> usize {
    (count / 8).clamp(3, 50)
}

/// The mean over the last `window` finite points, at the place of each finite point.
pub(crate) fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let finite: Vec<_> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    let mean = |end: usize| {
        let recent = &finite[(end + 1).saturating_sub(window)..=end];
        recent.iter().map(|point| point.1).sum::<f64>() / recent.len() as f64
    };
    finite.iter().enumerate().map(|(end, point)| (point.0, mean(end))).collect()
}

/// Draws a panel with its top left corner at `corner`.
fn draw_panel(
    picture: &mut Picture,
    corner: (usize, usize),
    size: (usize, usize),
    labels: &Labels,
    lines: &[Line],
) -> Result<()> {
    let (title_style, small) = (Style::bold(22.0), Style::grey(17.0));
    title_style.draw(picture, labels.title, corner.0 + 6, corner.1);
    draw_legend(picture, (corner.0 + 6, corner.1 + 30), labels.y, lines);

    let axes = Axes::of(lines);
    let canvas_size = (picture.width() as u32, picture.height() as u32);
    let ticks = {
        let root = BitMapBackend::with_buffer(picture.rgb_mut(), canvas_size).into_drawing_area();
        let (left, top) = (corner.0 as i32, (corner.1 + PANEL_HEAD) as i32);
        let plot_size = (size.0 as i32 - 18, (size.1 - PANEL_HEAD - small.line_height()) as i32);
        draw_plot(&root.shrink((left, top), plot_size), &axes, lines).map_err(|error| anyhow!("{error}"))?
    };
    ticks.draw(picture);
    let x_label_left = corner.0 + size.0 - 18 - small.width(labels.x).min(size.0 - 18);
    small.draw(picture, labels.x, x_label_left, corner.1 + size.1 - small.line_height());
    Ok(())
}

/// Draws grid, axes and curves, and says where the ticks are.
fn draw_plot(plot: &Area, axes: &Axes, lines: &[Line]) -> Result<Ticks, Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(plot)
        .x_label_area_size(30)
        .y_label_area_size(axes.y.label_width() as u32 + 14)
        .build_cartesian_2d(axes.x.range.clone(), axes.y.range.clone())?;
    let (x, y) = (&axes.x.range, &axes.y.range);
    let area = chart.plotting_area();
    for (tick, _) in &axes.y.ticks {
        area.draw(&PathElement::new([(x.start, *tick), (x.end, *tick)], RGBColor(228, 228, 232)))?;
    }
    let corner = [(x.start, y.end), (x.start, y.start), (x.end, y.start)];
    area.draw(&PathElement::new(corner, RGBColor(120, 120, 126)))?;
    let place = |point: (f64, f64), text: &str| (area.map_coordinate(&point), text.to_owned());
    let ticks = Ticks {
        x: axes.x.ticks.iter().map(|(tick, text)| place((*tick, y.start), text)).collect(),
        y: axes.y.ticks.iter().map(|(tick, text)| place((x.start, *tick), text)).collect(),
    };
    for line in lines {
        let style = line.color.stroke_width(line.width);
        for run in line.points.split(|point| !is_drawable(point)) {
            if line.dashed {
                chart.draw_series(DashedLineSeries::new(run.iter().copied(), 7, 5, style))?;
            } else {
                chart.draw_series(LineSeries::new(run.iter().copied(), style))?;
            }
            if let [point] = run {
                chart.draw_series([Circle::new(*point, line.width + 1, line.color.filled())])?;
            }
        }
    }
    Ok(ticks)
}

/// Pixels on the axes, and what is written there.
struct Ticks {
    x: Vec<((i32, i32), String)>,
    y: Vec<((i32, i32), String)>,
}

impl Ticks {
    fn draw(&self, picture: &mut Picture) {
        let style = tick_style();
        let half_line = style.line_height() / 2;
        for ((x, y), text) in &self.x {
            (1..5).for_each(|dy| picture.blend(i64::from(*x), i64::from(*y) + dy, style.color, 0.8));
            style.draw(picture, text, (*x as usize).saturating_sub(style.width(text) / 2), *y as usize + 7);
        }
        for ((x, y), text) in &self.y {
            (1..5).for_each(|dx| picture.blend(i64::from(*x) - dx, i64::from(*y), style.color, 0.8));
            let left = (*x as usize).saturating_sub(style.width(text) + 9);
            style.draw(picture, text, left, (*y as usize).saturating_sub(half_line));
        }
    }
}

/// Beside each other: a stroke of each curve with its label, and what the y axis means.
fn draw_legend(picture: &mut Picture, (left, top): (usize, usize), y_label: &str, lines: &[Line]) {
    let style = Style::grey(17.0);
    style.draw(picture, y_label, left, top);
    let mut x = left + style.width(y_label) + 24;
    let middle = top + style.line_height() / 2;
    for line in lines {
        let color = [line.color.0, line.color.1, line.color.2];
        let thickness = line.width as usize;
        for dx in (0..26).filter(|dx| !line.dashed || dx % 10 < 6) {
            for dy in 0..thickness {
                picture.blend((x + dx) as i64, (middle + dy - thickness / 2) as i64, color, 1.0);
            }
        }
        style.draw(picture, &line.label, x + 32, top);
        x += 32 + style.width(&line.label) + 20;
    }
}

/// Beyond this an extent would overflow.
fn is_drawable(point: &(f64, f64)) -> bool {
    point.0.abs() < 1e300 && point.1.abs() < 1e300
}

/// Both axes, fitted to the curves.
struct Axes {
    x: Axis,
    y: Axis,
}

impl Axes {
    fn of(lines: &[Line]) -> Self {
        let points = || lines.iter().flat_map(|line| &line.points).filter(|point| is_drawable(point));
        Axes {
            x: Axis::new(points().map(|point| point.0), 0.0, 8),
            y: Axis::new(points().map(|point| point.1), 0.06, 6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::picture::read_png;

    fn history(count: u64) -> Vec<Metrics> {
        let rewards = |iteration: u64| {
            let progress = iteration as f64 / 40.0;
            let jitter = 0.03 * (iteration as f64 * 12.9898).sin();
            [("composition", 0.65 + 0.13 * progress + jitter), ("parity", -0.47 + 0.07 * progress - jitter)]
        };
        let of = |iteration| {
            let mut metrics = Metrics::new(iteration);
            rewards(iteration).iter().for_each(|(task, reward)| metrics.set(names::reward_mean(task), *reward));
            metrics
        };
        (0..count).map(of).collect()
    }

    fn panels() -> Vec<RewardPanel> {
        let panel = |task: &str, base| RewardPanel { task: task.to_owned(), base };
        vec![panel("composition", Some(0.62)), panel("parity", None), panel("absent", None), panel("parity", Some(0.1))]
    }

    /// Pixels of exactly this colour inside the panel with this index.
    fn count(picture: &Picture, panel: usize, color: RGBColor) -> usize {
        let (left, top) = (MARGIN + panel % 3 * PANEL.0, MARGIN + 20 + panel / 3 * PANEL.1);
        let area = (top..top + PANEL.1).flat_map(|y| (left..left + PANEL.0).map(move |x| (x, y)));
        area.filter(|(x, y)| picture.pixel(*x, *y) == [color.0, color.1, color.2]).count()
    }

    #[test]
    fn each_panel_holds_its_curves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reward_curves.png");
        draw_reward_curves(&path, "Title", &history(40), &panels()).unwrap();
        let (picture, text) = read_png(&path).unwrap();
        assert_eq!(picture.width(), 2 * MARGIN + 3 * PANEL.0);
        assert_eq!(picture.height(), MARGIN + 35 + MARGIN / 2 + 2 * PANEL.1 + MARGIN);
        assert_eq!(text, [("Title".to_owned(), "Title".to_owned())]);
        // a thick curve over a panel 460 pixels wide; the legend alone is 26 × 3 = 78 pixels
        let curve = |panel: usize| count(&picture, panel, COLORS[panel]);
        assert!(curve(0) > 600 && curve(1) > 600 && curve(3) > 600, "{} {} {}", curve(0), curve(1), curve(3));
        assert_eq!(curve(2), 78, "no curve without its metric");
        let dashes = |panel| count(&picture, panel, RGBColor(90, 90, 98));
        assert!(dashes(0) > 200 && dashes(3) > 200 && dashes(1) < 40, "{} {} {}", dashes(0), dashes(3), dashes(1));
        let width = picture.width();
        assert!(
            (0..width).all(|x| picture.pixel(x, 0) == [255; 3] && picture.pixel(x, picture.height() - 1) == [255; 3])
        );
    }

    #[test]
    fn few_constant_and_broken_values_can_be_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        draw_reward_curves(&path, "t", &[], &panels()).unwrap();
        draw_reward_curves(&path, "t", &history(1), &panels()).unwrap();
        assert!(draw_reward_curves(&path, "t", &history(1), &[]).is_err());
        let nan = f64::NAN;
        for points in [
            vec![(0.0, 0.0)],
            vec![(1.0, 5.0), (2.0, 5.0)],
            vec![(0.0, nan), (nan, 1.0)],
            vec![(0.0, 1e300), (1.0, -1e300)],
        ] {
            let series = [Series { label: "a".to_owned(), points, dashed: true }];
            plot_series(&path, "t", "x", "y", &series).unwrap();
        }
        let error = plot_series(&folder.path().join("absent/b.png"), "t", "x", "y", &[]).unwrap_err();
        assert!(format!("{error:#}").contains("absent/b.png"), "{error:#}");
    }

    #[test]
    fn the_running_mean_skips_gaps() {
        let points = [(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0), (3.0, 5.0), (4.0, 7.0)];
        assert_eq!(running_mean(&points, 2), [(0.0, 1.0), (2.0, 2.0), (3.0, 4.0), (4.0, 6.0)]);
    }
}
