//! What rank 0 shows while it works: a bar on a terminal, one aligned line per iteration elsewhere.

use std::collections::VecDeque;
use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::metrics::{names, Metrics};
use super::screen::{bars, knows_its_width, suspended, Screen};
use crate::streams::Stream;

/// Lines between two column headers.
const HEADER_EVERY: u64 = 20;
/// Iterations whose mean duration predicts the time left.
const RECENT: usize = 10;

/// The progress of a run, on the screen until [`Progress::finish`] or its drop.
pub struct Progress {
    table: Table,
    bar: Option<ProgressBar>,
    total: u64,
    /// Seconds of the latest iterations.
    recent: VecDeque<f64>,
    /// Iterations of this process.
    shown: u64,
    started: Instant,
}

impl Progress {
    /// `tasks` are the names whose `<task>/reward_mean` is shown; `done` iterations of `total` lie before a resumed
    /// run.
    pub fn new(screen: Screen, tasks: &[String], done: u64, total: u64) -> Self {
        let bar = (screen == Screen::Bar).then(|| {
            let style = ProgressStyle::with_template(if knows_its_width() {
                "{bar:32.cyan/dim} {pos}/{len} after {elapsed_precise}{prefix}\n{wide_msg:.dim}"
            } else {
                "{bar:7} {pos}/{len}{prefix}  {wide_msg}"
            });
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─");
            let bar = bars().add(ProgressBar::new(total).with_position(done).with_style(style));
            // it panics where the operating system gives no thread; without, the bar moves at every iteration
            if std::thread::Builder::new().spawn(|| ()).is_ok() {
                bar.enable_steady_tick(Duration::from_millis(500));
            }
            bar
        });
        let table = Table::new(tasks, total);
        Progress { table, bar, total, recent: VecDeque::new(), shown: 0, started: Instant::now() }
    }

    /// Says what is going on before the first iteration or between two: "evaluating the base model".
    pub fn stage(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => print_line(text),
        }
    }

    /// Shows an iteration that has ended.
    pub fn iteration(&mut self, metrics: &Metrics) {
        if let Some(seconds) = metrics.get(names::SECONDS) {
            self.recent.push_back(seconds);
            if self.recent.len() > RECENT {
                self.recent.pop_front();
            }
        }
        let left = time_left(&self.recent, self.total.saturating_sub(metrics.iteration + 1));
        match &self.bar {
            Some(bar) => {
                bar.set_position(metrics.iteration + 1);
                bar.set_prefix(left.map_or_else(String::new, |seconds| format!(", {} left", clock(seconds))));
                bar.set_message(self.table.message(metrics));
            }
            None => {
                if self.shown % HEADER_EVERY == 0 {
                    print_line(&self.table.header());
                }
                print_line(&self.table.line(metrics, left));
            }
        }
        self.shown += 1;
    }

    /// Takes the bar away and says how long it took.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        print_line(&format!("{} iterations in {}", self.shown, clock(self.started.elapsed().as_secs_f64())));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A full disk or a closed pipe behind the screen is no reason to end a run.
fn print_line(line: &str) {
    let _ = suspended(|| Stream::out().write_all(format!("{line}\n").as_bytes()));
}

/// Which metrics are shown, and how wide.
struct Table {
    tasks: Vec<String>,
    total: u64,
    columns: Vec<Shown>,
}

/// One column of numbers.
struct Shown {
    title: String,
    metric: String,
    format: fn(f64) -> String,
    width: usize,
}

impl Table {
    fn new(tasks: &[String], total: u64) -> Self {
        let column = |title: &str, metric: &str, format: fn(f64) -> String, width: usize| Shown {
            title: title.to_owned(),
            metric: metric.to_owned(),
            format,
            width: width.max(title.chars().count()),
        };
        let mut columns: Vec<_> = tasks
            .iter()
            .map(|task| column(task, &names::reward_mean(task), |value| format!("{value:.4}"), 9))
            .collect();
        columns.push(column("clipped", names::CLIP_FRACTION, |value| format!("{value:.3}"), 5));
        columns.push(column("kl", names::APPROX_KL, |value| format!("{value:.2e}"), 9));
        columns.push(column("grad norm", names::GRADIENT_NORM, compact, 9));
        columns.push(column("samples/s", names::SAMPLES_PER_SECOND, compact, 9));
        columns.push(column("seconds", names::SECONDS, |value| format!("{value:.1}"), 7));
        Table { tasks: tasks.to_vec(), total, columns }
    }

    fn iteration_width(&self) -> usize {
        (2 * self.total.to_string().len() + 1).max("iteration".len())
    }

    fn header(&self) -> String {
        let mut line = format!("{:>1$}", "iteration", self.iteration_width());
        for column in &self.columns {
            line.push_str(&format!("  {:>1$}", column.title, column.width));
        }
        line + "  time left"
    }

    fn line(&self, metrics: &Metrics, left: Option<f64>) -> String {
        let position = format!("{}/{}", metrics.iteration + 1, self.total);
        let mut line = format!("{position:>0$}", self.iteration_width());
        for column in &self.columns {
            let text = metrics.get(&column.metric).map_or_else(|| "-".to_owned(), column.format);
            line.push_str(&format!("  {text:>0$}", column.width));
        }
        line + &format!("  {:>9}", left.map_or_else(|| "-".to_owned(), clock))
    }

    /// The text under the bar, or beside it.
    fn message(&self, metrics: &Metrics) -> String {
        let reward = |task: &String| {
            let reward = metrics.get(&names::reward_mean(task))?;
            Some(format!("{task} {reward:.3}"))
        };
        self.tasks.iter().filter_map(reward).collect::<Vec<_>>().join("  ")
    }
}

/// Four significant digits, without an exponent where that stays short.
fn compact(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if (1000.0..1e6).contains(&size) => format!("{value:.0}"),
        size if (100.0..1000.0).contains(&size) => format!("{value:.1}"),
        size if (10.0..100.0).contains(&size) => format!("{value:.2}"),
        size if (1.0..10.0).contains(&size) => format!("{value:.3}"),
        size if (1e-3..1.0).contains(&size) => format!("{value:.4}"),
        size if size.is_finite() => format!("{value:.2e}"),
        _ => value.to_string(),
    }
}

/// Seconds until `remaining` iterations are done, from the mean of the recent ones; unknown without any.
fn time_left(recent: &VecDeque<f64>, remaining: u64) -> Option<f64> {
    let seconds = recent.iter().sum::<f64>() / recent.len() as f64;
    (!recent.is_empty() && seconds.is_finite()).then_some(seconds * remaining as f64)
}

/// h:mm:ss; from a day on "2d 05h".
fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    if days > 0 {
        return format!("{days}d {hours:02}h");
    }
    format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(iteration: u64, reward: f64) -> Metrics {
        let mut metrics = Metrics::new(iteration);
        metrics.set("composition/reward_mean", reward);
        metrics.set("a_task_of_a_long_name/reward_mean", -reward);
        metrics.set(names::CLIP_FRACTION, 0.125);
        metrics.set(names::APPROX_KL, 3.21e-9);
        metrics.set(names::GRADIENT_NORM, 0.0241);
        metrics.set(names::SAMPLES_PER_SECOND, 12.34);
        metrics.set(names::SECONDS, 13.0);
        metrics
    }

    fn table() -> Table {
        Table::new(&["composition".to_owned(), "a_task_of_a_long_name".to_owned()], 24)
    }

    #[test]
    fn columns_end_where_their_titles_end() {
        let table = table();
        let header = table.header();
        let ends = |text: &str| -> Vec<usize> {
            let last = |(at, word): (usize, char)| (word != ' ').then_some(at);
            let filled: Vec<usize> = text.chars().enumerate().filter_map(last).collect();
            // a column ends where at least two spaces, or the line, follow
            let followed = |at: &usize| !filled.contains(&(at + 1)) && !filled.contains(&(at + 2));
            filled.iter().copied().filter(followed).collect()
        };
        for reward in [0.65, -12345.5, f64::NAN] {
            let line = table.line(&metrics(9, reward), Some(182.0));
            assert_eq!(ends(&line), ends(&header), "\n{header}\n{line}");
        }
        assert_eq!(header.split_whitespace().next(), Some("iteration"));
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            cells(&table.line(&metrics(9, 0.65), Some(182.0))),
            ["10/24", "0.6500", "-0.6500", "0.125", "3.21e-9", "0.0241", "12.34", "13.0", "0:03:02"]
        );
        assert_eq!(cells(&table.line(&Metrics::new(0), None)), ["1/24", "-", "-", "-", "-", "-", "-", "-", "-"]);
    }

    #[test]
    fn the_bar_tells_the_rewards() {
        let message = table().message(&metrics(0, 0.65));
        assert_eq!(message, "composition 0.650  a_task_of_a_long_name -0.650");
        assert_eq!(table().message(&Metrics::new(0)), "");
    }

    #[test]
    fn time_left_comes_from_recent_iterations() {
        assert_eq!(time_left(&VecDeque::new(), 5), None);
        assert_eq!(time_left(&VecDeque::from([2.0, 4.0]), 5), Some(15.0));
        assert_eq!(time_left(&VecDeque::from([f64::NAN]), 5), None);
        let mut progress = Progress::new(Screen::Lines, &[], 0, 100);
        for iteration in 0..15 {
            let mut metrics = Metrics::new(iteration);
            metrics.set(names::SECONDS, if iteration < 5 { 1000.0 } else { 1.0 });
            progress.iteration(&metrics);
        }
        assert_eq!(time_left(&progress.recent, 85), Some(85.0));
    }

    #[test]
    fn numbers_stay_within_their_columns() {
        for value in [0.0, 1e-9, 0.0241, 0.5, 9.876, 98.76, 987.6, 98765.4, 9.87654e9, -0.0241, f64::NAN, f64::INFINITY]
        {
            assert!(compact(value).len() <= 9, "{}", compact(value));
        }
        assert_eq!(clock(59.6), "0:01:00");
        assert_eq!(clock(90_061.0), "1d 01h");
    }
}
