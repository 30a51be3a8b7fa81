//! `rldiff human-eval`: pages on which people compare models, and the count of their answers.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};

use super::{device_args::DeviceArgs, drawing_args::DrawingArgs, numbers::whole, Failure, OrMistake};
use crate::{
    comm::{agree, all_made, Communicator},
    cut_prompts,
    draw::{Drawing, Painter},
    evaluation::TrainedOn,
    folders::{can_be_file, outputs, FolderLock},
    human_eval::{
        guidelines,
        pages::{State, StudyFiles},
        places::hand_out_again,
        prompts::{says_how_many, Asked, Prompts},
        study::{Model, Pairing, Prompt, Study},
        tally::Tally,
        votes,
    },
    memory,
    models::{folder::ModelFiles, pipeline::Pipeline},
    run::{load_model, model_location},
    streams,
    telemetry::{save_png, write_atomic},
};

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    build: BuildArgs,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Count the answers that raters have sent.
    Tally(TallyArgs),
    /// Hand out the queries of raters who are missing to new ones (a study with --per-rater).
    Again(AgainArgs),
}

#[derive(clap::Args)]
struct BuildArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// A model to compare: `miniature`, a diffusers folder, or a run's folder (its tuned model). Two or more.
    #[arg(long = "model", value_name = "DIR")]
    models: Vec<String>,
    /// Which models meet where there are more than two [default: all].
    #[arg(long, value_enum)]
    pairing: Option<Pairing>,
    /// What to draw for the questions on single pictures. May be given several times.
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// File with one such prompt per line.
    #[arg(long = "prompts", value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Draw the prompts of this set of an evaluation, for example slurm/eval-preference.toml:partiprompts. May be given several
    /// times. A number at the end says how many prompts of it: slurm/eval-preference.toml:diffusiondb:300.
    #[arg(long = "prompt-set", value_name = "CONFIG:SET[:N]")]
    prompt_sets: Vec<String>,
    /// Prompts of each --prompt-set that does not say how many; 0 for as many as its evaluation takes.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(0, 16_777_216))]
    prompt_count: Option<usize>,
    /// What to draw for the question on sets of six pictures. May be given several times.
    #[arg(long = "group-prompt", value_name = "TEXT")]
    group_prompts: Vec<String>,
    /// File with one such prompt per line.
    #[arg(long = "group-prompts", value_name = "FILE")]
    group_prompt_file: Option<PathBuf>,
    /// Draw the prompts of this set of an evaluation, for example slurm/eval-parity.toml:occupations; a
    /// number at the end as for --prompt-set.
    #[arg(long = "group-prompt-set", value_name = "CONFIG:SET[:N]")]
    group_prompt_sets: Vec<String>,
    /// Prompts of each --group-prompt-set that does not say how many; 0 for as many as its evaluation takes.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(0, 16_777_216))]
    group_prompt_count: Option<usize>,
    /// Heading of the pages; raters read it.
    #[arg(long, default_value = "Which picture is better?", value_name = "TEXT")]
    title: String,
    /// Votes that every query should get, each from another rater.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole::<usize>(1, 10_000))]
    raters: usize,
    /// Queries that a rater gets at most: they are shared out among as many raters as that takes, each with a folder, an
    /// order and sides of his own. Without it every rater gets all queries.
    #[arg(long, value_name = "M", value_parser = whole::<usize>(1, 16_777_216))]
    per_rater: Option<usize>,
    /// Guidelines for the raters in place of the built-in ones: Markdown.
    #[arg(long, value_name = "FILE")]
    guidelines: Option<PathBuf>,
    #[command(flatten)]
    drawing: DrawingArgs,
    /// Folder for the study: study.json, and pages/ for the raters.
    #[arg(long, default_value = "human-eval", value_name = "DIR")]
    out: PathBuf,
}

#[derive(clap::Args)]
struct TallyArgs {
    /// The study's folder, or its study.json.
    study: PathBuf,
    /// Raters' files, or folders of them (every .json in it).
    #[arg(required = true, value_name = "VOTES")]
    votes: Vec<PathBuf>,
    /// Also write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write the tables to this file.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

#[derive(clap::Args)]
struct AgainArgs {
    /// The study's folder.
    study: PathBuf,
    /// Raters' files so far, or folders of them (every .json in it): what they answer is not handed out again.
    #[arg(value_name = "VOTES", required_unless_present = "missing")]
    votes: Vec<PathBuf>,
    /// Numbers of the missing raters, for example 7,9. Without it all votes that are not there are handed out again.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    missing: Vec<usize>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    match args.command {
        Some(Command::Tally(_) | Command::Again(_)) if comm.rank() != 0 => Ok(()),
        Some(Command::Tally(args)) => tally(&args),
        Some(Command::Again(args)) => again(&args),
        None => build(&args.build, comm),
    }
}

fn build(args: &BuildArgs, comm: &dyn Communicator) -> Result<(), Failure> {
    let models: Vec<&str> = args.models.iter().map(String::as_str).collect();
    let (drawing, taken_from) = args.drawing.drawing(&models, comm).or_mistake()?;
    // tried without the models first: that costs nothing
    let own = args.guidelines.as_deref().map(guidelines::read).transpose();
    let own = all_made(comm, own).or_mistake()?;
    let asked = prompts(args, comm).or_mistake()?;
    let [of_pairs, of_groups] = asked.each_ref().map(Prompts::all);
    let plan = |digests: &[String]| plan(args, &drawing, &of_pairs, &of_groups, own.as_deref(), digests);
    let queries = plan(&vec![String::new(); args.models.len()]).or_mistake()?.queries;
    let trained_on = args.models.iter().filter(|_| comm.rank() == 0);
    let trained_on: Vec<TrainedOn> = trained_on.flat_map(|model| TrainedOn::of_files(model, model)).collect();
    asked.iter().try_for_each(|prompts| prompts.hold_sets_against(&trained_on, comm)).or_mistake()?;
    if comm.rank() == 0 {
        warn_of_no_effect(args, own.as_deref());
    }
    let prompts: BTreeSet<&str> = queries.iter().map(|query| query.prompt.as_str()).collect();
    let files = StudyFiles::new(&args.out);
    let _lock = FolderLock::hold(comm, &args.out, "human-eval", || files.check_place()).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    tch::set_num_threads(1);

    let (mut digests, mut size) = (Vec::new(), None);
    for name in &args.models {
        let files = ModelFiles::read_and_broadcast(&model_location(name), comm).or_mistake()?;
        digests.push(files.digest().or_mistake()?);
        let pipeline = Pipeline::from_files(files, device).or_mistake()?;
        let own = Painter::new(&pipeline, name, &drawing).or_mistake()?.size();
        same_size(name, own, *size.get_or_insert(own)).or_mistake()?;
        if comm.rank() == 0 {
            let texts = prompts.iter().copied().chain([drawing.negative.as_str()]);
            cut_prompts::warn(&format!("{name}: "), &pipeline.tokenizer, texts)?;
        }
    }
    let study = plan(&digests).or_mistake()?;
    let state = all_made(comm, files.state(&study)).or_mistake()?;
    // all ranks have looked before one of them changes anything
    comm.barrier()?;
    // a mistake is said alone, so warnings come after all that can be one
    asked.iter().try_for_each(|prompts| prompts.warn_of_given(&trained_on, comm))?;
    if comm.rank() == 0 {
        say!("{taken_from}");
    }
    if state != State::Complete {
        agree(comm, if comm.rank() == 0 { files.begin(&study) } else { Ok(()) })?;
        for (index, model) in study.models.iter().enumerate() {
            let pipeline = load_model(&model.name, comm, device)?;
            agree(comm, draw(&files, &study, index, &Painter::new(&pipeline, &model.name, &drawing)?, comm))?;
        }
        let (height, width) = size.expect("there are models");
        let written = || files.finish(&study, (width as usize, height as usize));
        agree(comm, if comm.rank() == 0 { written() } else { Ok(()) })?;
    }
    if comm.rank() == 0 {
        say_what_is_there(&files, &study, state, &args.out);
    }
    Ok(())
}

fn say_what_is_there(files: &StudyFiles, study: &Study, state: State, out: &Path) {
    let already = if state == State::Complete { " (they were there already)" } else { "" };
    let of_queries = |count: usize| if count == 1 { "1 query".to_owned() } else { format!("{count} queries") };
    let (queries, raters) = (of_queries(study.queries.len()), study.raters);
    match study.assignments.iter().map(|rater| rater.queries.len()).max() {
        None => {
            say!("{queries} for {raters} raters in {}{already}", files.pages().display());
            say!("give them that folder: they open its index.html, from disk or from any web server");
        }
        Some(most) => {
            let count = study.assignments.len();
            let (raters_at, most) = (files.raters(), of_queries(most));
            say!("{queries} with {raters} votes each for {count} raters in {}{already}", raters_at.display());
            say!("give each of them one of its folders ({most} at most): he opens its index.html, from disk or from any web server");
            say!(
                "hand out what missing raters have not answered with: rldiff human-eval again {} FOLDER_OF_VOTES",
                out.display()
            );
        }
    }
    say!("keep {}: it says which model is on which side", files.study().display());
    say!("count what they send back with: rldiff human-eval tally {} FOLDER_OF_VOTES", out.display());
}

/// Names the options that change nothing here.
fn warn_of_no_effect(args: &BuildArgs, own_guidelines: Option<&str>) {
    for (group, count, sets) in
        [("", args.prompt_count, &args.prompt_sets), ("group-", args.group_prompt_count, &args.group_prompt_sets)]
    {
        let Some(count) = count else { continue };
        if sets.is_empty() {
            log::warn!(
                "--{group}prompt-count {count} has no effect: it is for the sets of --{group}prompt-set, none is given"
            );
        } else if sets.iter().all(|set| says_how_many(set)) {
            log::warn!("--{group}prompt-count {count} has no effect: every --{group}prompt-set says how many prompts by itself");
        }
    }
    if let (Some(pairing), 2) = (args.pairing, args.models.len()) {
        let name = if pairing == Pairing::First { "first" } else { "all" };
        log::warn!("--pairing {name} has no effect: two models are one pair");
    }
    let departures = own_guidelines.and_then(|text| guidelines::Page::of(text).departures());
    if let (Some(path), Some(departures)) = (&args.guidelines, departures) {
        log::warn!("{}: {departures}", path.display());
    }
}

/// Prompts for single pictures and for sets of pictures. A collective call.
fn prompts(args: &BuildArgs, comm: &dyn Communicator) -> Result<[Prompts; 2]> {
    let pairs = Asked {
        texts: &args.prompts,
        file: args.prompt_file.as_ref(),
        sets: &args.prompt_sets,
        count: args.prompt_count.unwrap_or(0),
    };
    let groups = Asked {
        texts: &args.group_prompts,
        file: args.group_prompt_file.as_ref(),
        sets: &args.group_prompt_sets,
        count: args.group_prompt_count.unwrap_or(0),
    };
    Ok([Prompts::read(&pairs, comm)?, Prompts::read(&groups, comm)?])
}

fn plan(
    args: &BuildArgs,
    drawing: &Drawing,
    pair_prompts: &[Prompt],
    group_prompts: &[Prompt],
    guidelines: Option<&str>,
    digests: &[String],
) -> Result<Study> {
    let models = args.models.iter().zip(digests);
    let models = models.map(|(name, digest)| Model { name: name.clone(), digest: digest.clone() }).collect();
    let (pairing, drawing) = (args.pairing.unwrap_or(Pairing::All), drawing.clone());
    let study = Study::plan(&args.title, models, pairing, pair_prompts, group_prompts, args.raters, drawing)?;
    Study { guidelines: guidelines.map(str::to_owned), ..study }.shared_out(args.per_rater)
}

/// Raters would know the models by the size of their pictures.
fn same_size(name: &str, own: (i64, i64), first: (i64, i64)) -> Result<()> {
    ensure!(
        own == first,
        "{name} draws {}×{} pixels, the first model {}×{}: give --width and --height",
        own.1,
        own.0,
        first.1,
        first.0
    );
    Ok(())
}

/// Draws this rank's share of a model's pictures; those that are there already stay.
fn draw(files: &StudyFiles, study: &Study, model: usize, painter: &Painter, comm: &dyn Communicator) -> Result<()> {
    let _stage = memory::stage("drawing of a picture", 1, "make it smaller (--height, --width)");
    let pictures = files.pictures(study, model).into_iter();
    for (sample, picture) in pictures.skip(comm.rank()).step_by(comm.size()) {
        if picture.files.iter().all(|file| file.exists()) {
            continue;
        }
        let drawn = painter.picture(&picture.prompt, sample)?;
        for file in &picture.files {
            save_png(file, &drawn, &[])?;
        }
    }
    Ok(())
}

fn tally(args: &TallyArgs) -> Result<(), Failure> {
    let path = if args.study.is_dir() { StudyFiles::new(&args.study).study() } else { args.study.clone() };
    let study = Study::read(&path).or_mistake()?;
    [&args.json, &args.markdown].into_iter().flatten().try_for_each(|path| can_be_file(path)).or_mistake()?;
    let sessions = votes::read_all(&study, &args.votes).or_mistake()?;
    let replaceable = |path: &Option<PathBuf>, is_ours: &dyn Fn(&[u8]) -> bool| {
        path.as_ref().map_or(Ok(()), |path| outputs::may_replace(path, is_ours))
    };
    replaceable(&args.json, &outputs::is_json_with(&["study", "raters", "comparisons"])).or_mistake()?;
    replaceable(&args.markdown, &|bytes| bytes.starts_with(b"# Human evaluation: ")).or_mistake()?;
    let tally = Tally::of(&study, &sessions);
    let markdown = tally.markdown();
    if let Some(path) = &args.json {
        let json = serde_json::to_vec_pretty(&tally).context("the tally as JSON")?;
        write_atomic(path, &[&json[..], b"\n"].concat())?;
    }
    if let Some(path) = &args.markdown {
        write_atomic(path, markdown.as_bytes())?;
    }
    streams::print(format_args!("{markdown}"));
    Ok(())
}

fn again(args: &AgainArgs) -> Result<(), Failure> {
    let files = StudyFiles::new(&args.study);
    // before the lock, which makes its folder
    Study::read(&files.study()).or_mistake()?;
    let _lock = FolderLock::take(&args.study, "human-eval").or_mistake()?;
    let mut study = Study::read(&files.study()).or_mistake()?;
    let sessions = votes::read_all(&study, &args.votes).or_mistake()?;
    let before = hand_out_again(&mut study, &sessions, &args.missing).or_mistake()?;
    files.hand_out_again(&study, before)?;
    for rater in study.again.iter().filter(|rater| rater.number > before) {
        let instead: BTreeSet<usize> = rater.queries.iter().filter_map(|asked| asked.instead_of).collect();
        let instead = instead.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let queries = if rater.queries.len() == 1 { "query" } else { "queries" };
        let folder = files.of_rater(rater.number);
        say!("rater {} has {} {queries} of {instead} in {}", rater.number, rater.queries.len(), folder.display());
    }
    say!("give each to somebody who has not answered yet; of two raters of one place in a query the fuller answer counts, then the later");
    Ok(())
}
