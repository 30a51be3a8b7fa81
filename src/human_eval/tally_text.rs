//! A tally as tables for people, in Markdown.

use std::fmt::Write;

use super::{
    interval::Share,
    questions::Edition,
    tally::{Comparison, Tally},
};

/// Queries, or raters, that are named one by one.
const NAMED: usize = 12;

impl Tally {
    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut text = format!("# Human evaluation: {}\n\n", self.title);
        let votes: usize = self.comparisons.iter().map(|c| c.votes).sum();
        let lost: usize = self.comparisons.iter().filter_map(|c| Some(c.did_not_load?.counted)).sum();
        let _ = write!(text, "{} raters, {} queries, {} answers.", self.raters.len(), self.queries, votes + lost);
        if lost > 0 {
            let _ = write!(text, " {lost} of them say that a picture did not load and are in no other share.");
        }
        text.push('\n');
        if self.queries_with_fewer > 0 {
            let (fewer, wanted) = (self.queries_with_fewer, self.raters_per_query);
            let _ = write!(text, "{fewer} of {} queries have fewer than {wanted} raters: ", self.queries);
            let named = self.lacking.iter().take(NAMED).map(|query| format!("{} ({})", query.query, query.votes));
            text.push_str(&named.collect::<Vec<_>>().join(", "));
            text.push_str(if fewer > NAMED { ", … (the JSON file has all).\n" } else { ".\n" });
        }
        if !self.absent_raters.is_empty() {
            let numbers = self.absent_raters.iter().take(NAMED).map(usize::to_string).collect::<Vec<_>>().join(", ");
            let more = if self.absent_raters.len() > NAMED { ", …" } else { "" };
            let _ = writeln!(
                text,
                "{} raters have sent nothing: {numbers}{more}. `rldiff human-eval again STUDY VOTES` hands out their queries again.",
                self.absent_raters.len()
            );
        }
        if self.answers_left_out > 0 {
            let _ = writeln!(
                text,
                "{} more answers are not counted: another rater got the query again and has answered it.",
                self.answers_left_out
            );
        }
        text.push_str("In brackets 95 % confidence intervals, with the queries as the units that vary.\n");
        let mut names: Vec<(&str, &str)> = Vec::new();
        for c in &self.comparisons {
            if !names.contains(&(&c.first, &c.second)) {
                names.push((&c.first, &c.second));
            }
        }
        for (first, second) in names {
            let _ = writeln!(text, "\n## {first} against {second}\n");
            let meets = |c: &&Comparison| c.first == first && c.second == second;
            self.table(&mut text, "question", (first, second), self.comparisons.iter().filter(meets));
            if self.by_set.iter().any(|c| meets(&c)) {
                text.push('\n');
                self.table(&mut text, "set: question", (first, second), self.by_set.iter().filter(meets));
            }
        }
        text.push_str("\n## Rank of the models\n\n| question | rank | model | strength |\n|---|---|---|---|\n");
        for of_question in &self.ranks {
            let title = of_question.title;
            let Some(models) = &of_question.models else {
                let _ = writeln!(text, "| {title} | – | no chain of votes connects all models | – |");
                continue;
            };
            for r in models {
                let numbers = [r.strength, r.low, r.high].map(|x| format!("{x:.2}").replace('-', "−"));
                let [strength, low, high] = numbers;
                let place = format!("{} ({}–{})", r.rank, r.rank_low, r.rank_high);
                let _ = writeln!(text, "| {title} | {place} | {} | {strength} ({low} to {high}) |", r.model);
            }
        }
        text.push_str(
            "\nstrength is Bradley–Terry's θ, with mean 0: a model is preferred to one that is weaker by d in a share \
             1/(1 + exp(−d)) of the votes. A vote for neither counts half for each. In brackets 95 % intervals over draws of the \
             prompts with replacement.\n",
        );
        text.push_str("\n| rater | answers | median seconds per query |\n|---|---|---|\n");
        for rater in &self.raters {
            // a name is whatever the rater typed
            let name = rater.name.replace('|', "\\|").replace(char::is_control, " ");
            let number = rater.number.map_or(String::new(), |number| format!("{number}: "));
            let _ = writeln!(text, "| {number}{name} | {} | {:.1} |", rater.answers, rater.median_seconds_per_query);
        }
        text.push_str(
            "\nraters agree: share of the pairs of votes on one query that are equal. alpha is Krippendorff's (nominal): 1 where \
             raters agree fully, 0 where they agree as by chance; it is not defined where all gave one and the same answer. \
             \"left\" is near 50 % where raters favour no side.\n",
        );
        text
    }

    fn table<'a>(
        &self,
        text: &mut String,
        heading: &str,
        (first, second): (&str, &str),
        rows: impl Iterator<Item = &'a Comparison>,
    ) {
        let others = match self.edition {
            Edition::First => "both good | both bad",
            Edition::Paper => "not sure or similar | did not load (of all answers)",
        };
        let _ = writeln!(
            text,
            "| {heading} | votes | {first} | {second} | {others} | {second}, of those that prefer one | left, of those | raters agree | alpha |"
        );
        text.push_str("|---|---|---|---|---|---|---|---|---|---|\n");
        for c in rows {
            let others = match self.edition {
                Edition::First => [c.both_good, c.both_bad],
                Edition::Paper => [c.not_sure, c.did_not_load],
            };
            let shares = [c.first_preferred, c.second_preferred, others[0], others[1]];
            let shares: Vec<String> =
                shares.into_iter().chain([c.second_of_decided, c.left_of_decided]).map(percent).collect();
            let agree = c.agreement.map_or("–".to_owned(), |share| format!("{:.0} %", 100.0 * share));
            let alpha = c.alpha.map_or("–".to_owned(), |alpha| format!("{alpha:.2}").replace('-', "−"));
            let row = c.set.as_ref().map_or(c.title.to_owned(), |set| format!("{set}: {}", c.title));
            let _ = writeln!(text, "| {row} | {} | {} | {agree} | {alpha} |", c.votes, shares.join(" | "));
        }
    }
}

/// "62 % (51–72)".
fn percent(share: Option<Share>) -> String {
    let hundred = |x: f64| format!("{:.0}", 100.0 * x);
    share.map_or("–".to_owned(), |s| format!("{} % ({}–{})", hundred(s.share), hundred(s.low), hundred(s.high)))
}
