//! A line chart as SVG: drawn here, legible without a script; the page's script adds the values under the pointer.

use std::fmt::Write;

use serde_json::json;

use super::html::escape;
use crate::telemetry::Axis;

/// Size in the units of the drawing.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 240.0;
const TOP: f64 = 12.0;
const RIGHT: f64 = 14.0;
/// For the numbers of the x axis and its name.
const BOTTOM: f64 = 42.0;
/// About the width of a digit in the axes' font.
const DIGIT: f64 = 7.6;

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub label: String,
    /// Which of the page's colours.
    pub color: usize,
    pub look: Look,
    /// (x, y) with rising x; points that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// A measured value: a thin, pale line.
    Raw,
    /// What is to be looked at: a thick line.
    Main,
    /// The same with a dot at each point, where there are few.
    Dots,
    /// A level to compare with: dashed.
    Level,
}

impl Look {
    fn class(self) -> &'static str {
        match self {
            Look::Raw => "raw",
            Look::Main => "main",
            Look::Dots => "main dots",
            Look::Level => "level",
        }
    }
}

/// A chart with its heading. `unit` stands behind the title; lines of the same label share a colour and one entry of the
/// legend, which is left out where there is one label only.
pub fn chart(title: &str, unit: &str, x_name: &str, lines: &[Line]) -> String {
    let finite =
        |line: &Line| line.points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect::<Vec<_>>();
    let points: Vec<(f64, f64)> = lines.iter().flat_map(finite).collect();
    let x = Axis::new(points.iter().map(|p| p.0), 0.0, 7);
    let y = Axis::new(points.iter().map(|p| p.1), 0.06, 5);
    let digits = y.ticks.iter().map(|(_, text)| text.chars().count()).max().unwrap_or(0);
    let left = 14.0 + DIGIT * digits as f64;
    let (width, height) = (WIDTH - left - RIGHT, HEIGHT - TOP - BOTTOM);
    let place_x = |value: f64| left + (value - x.range.start) / (x.range.end - x.range.start) * width;
    let place_y = |value: f64| TOP + (y.range.end - value) / (y.range.end - y.range.start) * height;

    let mut svg = String::new();
    for (value, text) in &y.ticks {
        let at = place_y(*value);
        let _ = write!(svg, "<path class=\"grid\" d=\"M{left:.1} {at:.1}H{:.1}\"/>", left + width);
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            left - 6.0,
            at + 4.0
        );
    }
    let floor = TOP + height;
    for (value, text) in &x.ticks {
        let at = place_x(*value);
        let _ = write!(svg, "<path class=\"axis\" d=\"M{at:.1} {floor:.1}v4\"/>");
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
            floor + 16.0
        );
    }
    let _ = write!(svg, "<path class=\"axis\" d=\"M{left:.1} {TOP:.1}V{floor:.1}H{:.1}\"/>", left + width);
    let (x_end, x_below) = (left + width, HEIGHT - 6.0);
    let _ = write!(
        svg,
        "<text class=\"tick\" x=\"{x_end:.1}\" y=\"{x_below:.1}\" text-anchor=\"end\">{}</text>",
        escape(x_name)
    );
    for line in lines {
        let class = format!("{} c{}", line.look.class(), line.color % 6);
        for run in line.points.split(|p| !(p.0.is_finite() && p.1.is_finite())).filter(|run| !run.is_empty()) {
            let places: Vec<String> =
                run.iter().map(|&(x, y)| format!("{:.1},{:.1}", place_x(x), place_y(y))).collect();
            if run.len() > 1 {
                let _ = write!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", places.join(" "));
            }
            if run.len() == 1 || line.look == Look::Dots {
                for &(x, y) in run {
                    let (x, y) = (place_x(x), place_y(y));
                    let _ = write!(svg, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"/>");
                }
            }
        }
    }

    // for the script: where the plot is, and the values
    let values: Vec<_> = lines
        .iter()
        .filter(|line| line.look != Look::Level)
        .map(|line| json!({"label": hover_label(line), "color": line.color % 6, "points": rounded(&finite(line))}))
        .collect();
    let data = json!({"left": left, "width": width, "top": TOP, "height": height,
                      "x": [x.range.start, x.range.end], "xName": x_name, "lines": values});
    let unit_text =
        if unit.is_empty() { String::new() } else { format!(" <span class=\"unit\">{}</span>", escape(unit)) };
    let description = describe(title, unit, x_name, lines);
    format!(
        "<figure class=\"chart\"><figcaption>{}{unit_text}</figcaption>{}\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" tabindex=\"0\" aria-label=\"{}\" data-chart=\"{}\">{svg}</svg></figure>\n",
        escape(title),
        legend(lines),
        escape(&description),
        escape(&data.to_string())
    )
}

/// To seven digits: more than anyone reads, and half the size.
fn rounded(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let round = |value: f64| format!("{value:.6e}").parse().unwrap_or(value);
    points.iter().map(|&(x, y)| (round(x), round(y))).collect()
}

fn hover_label(line: &Line) -> String {
    match line.look {
        Look::Raw => format!("{}, this iteration", line.label),
        _ => line.label.clone(),
    }
}

fn legend(lines: &[Line]) -> String {
    let mut entries: Vec<(&str, usize, &str)> = Vec::new();
    for line in lines.iter().filter(|line| line.look != Look::Raw) {
        let entry = (line.label.as_str(), line.color, if line.look == Look::Level { "level" } else { "main" });
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    if entries.len() < 2 {
        return String::new();
    }
    let entry = |(label, color, look): (&str, usize, &str)| {
        let sample = format!(
            "<svg viewBox=\"0 0 24 8\" aria-hidden=\"true\"><path class=\"{look} c{}\" d=\"M1 4H23\"/></svg>",
            color % 6
        );
        format!("<li>{sample}{}</li>", escape(label))
    };
    format!("<ul class=\"legend\">{}</ul>", entries.into_iter().map(entry).collect::<String>())
}

/// What a reader of the screen hears: where each curve begins and ends.
fn describe(title: &str, unit: &str, x_name: &str, lines: &[Line]) -> String {
    let mut text = format!("{title}{}{unit} over {x_name}", if unit.is_empty() { "" } else { " in " });
    for line in lines.iter().filter(|line| matches!(line.look, Look::Main | Look::Dots)) {
        let finite: Vec<_> = line.points.iter().filter(|p| p.1.is_finite()).collect();
        if let (Some(first), Some(last)) = (finite.first(), finite.last()) {
            let _ = write!(text, "; {}: from {:.4} to {:.4}", line.label, first.1, last.1);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(look: Look, points: &[(f64, f64)]) -> Line {
        Line { label: "joint <1>".into(), color: 7, look, points: points.to_vec() }
    }

    /// The numbers in the `points` of a drawing's polylines.
    fn polylines(svg: &str) -> Vec<Vec<(f64, f64)>> {
        svg.split("points=\"")
            .skip(1)
            .map(|rest| {
                let points = rest.split('"').next().unwrap().split(' ');
                points
                    .map(|point| point.split_once(',').unwrap())
                    .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
                    .collect()
            })
            .collect()
    }

    #[test]
    fn points_lie_where_the_axes_say() {
        let svg = chart("reward", "", "iteration", &[line(Look::Main, &[(0.0, 0.0), (5.0, 1.0), (10.0, 0.5)])]);
        let drawn = &polylines(&svg)[0];
        // x: from the left end to the right end, in equal parts; y: 6 % of room above and below
        assert_eq!(drawn.len(), 3);
        assert!((drawn[2].0 - (WIDTH - RIGHT)).abs() < 0.11, "{drawn:?}");
        assert!((drawn[1].0 - (drawn[0].0 + drawn[2].0) / 2.0).abs() < 0.11, "{drawn:?}");
        let height = HEIGHT - TOP - BOTTOM;
        let y = |value: f64| TOP + (1.06 - value) / 1.12 * height;
        for (point, value) in drawn.iter().zip([0.0, 1.0, 0.5]) {
            assert!((point.1 - y(value)).abs() < 0.06, "{point:?} {}", y(value));
        }
        for tick in ["0.0", "0.5", "1.0"] {
            assert!(svg.contains(&format!("text-anchor=\"end\">{tick}</text>")), "{tick}: {svg}");
        }
        assert!(svg.contains("text-anchor=\"end\">iteration</text>"));
        assert!(svg.contains("aria-label=\"reward over iteration; joint &lt;1&gt;: from 0.0000 to 0.5000\""), "{svg}");
    }

    #[test]
    fn gaps_are_left_and_lone_points_are_seen() {
        let points = [(1.0, 1.0), (2.0, 2.0), (3.0, f64::NAN), (4.0, 1.0), (5.0, f64::INFINITY)];
        let svg = chart("x", "s", "iteration", &[line(Look::Main, &points)]);
        assert_eq!(polylines(&svg).len(), 1);
        assert_eq!(svg.matches("<circle").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains("<span class=\"unit\">s</span>"));
        // nothing finite at all is still a chart
        let empty = chart("x", "", "iteration", &[line(Look::Main, &[(1.0, f64::NAN)])]);
        assert!(polylines(&empty).is_empty() && empty.contains("</svg>"));
        let dots = chart("x", "", "iteration", &[line(Look::Dots, &points[..2])]);
        assert_eq!((polylines(&dots).len(), dots.matches("<circle").count()), (1, 2));
    }

    #[test]
    fn the_script_finds_the_values_and_the_legend_names_each_curve_once() {
        let other = Line { label: "b".into(), color: 1, ..line(Look::Main, &[(1.0, 3.0)]) };
        let lines = [line(Look::Raw, &[(1.0, 2.0)]), line(Look::Main, &[(1.0, 2.5)]), other];
        let svg = chart("x", "", "iteration", &lines);
        assert_eq!(svg.matches("<li>").count(), 2);
        let data = svg.split("data-chart=\"").nth(1).unwrap().split('"').next().unwrap();
        let data = data.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
        let data: serde_json::Value = serde_json::from_str(&data).unwrap();
        assert_eq!(data["lines"][0]["label"], "joint <1>, this iteration");
        assert_eq!(data["lines"][1]["points"], serde_json::json!([[1.0, 2.5]]));
        assert_eq!(chart("x", "", "iteration", &lines[..2]).matches("<li>").count(), 0);
    }
}
