//! Decoded pairs ahead of time: a few threads read and decode the batches that come next while the model computes.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::{
        mpsc::{channel, Receiver, Sender},
        Arc, Mutex,
    },
};

use anyhow::{anyhow, bail, Context, Result};

use super::shards::Shards;
use crate::{config::WebdatasetPairs, image_file::decode_middle, random::Coordinates, word_list::WordList};

/// A sample whose pair cannot be used takes another one, and so on; after this many the run stops.
const ATTEMPTS: usize = 64;

/// Which batch: iteration, step within it, lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub iteration: u32,
    pub slot: u16,
    pub lane: usize,
}

impl Place {
    /// Coordinates of the batch's samples.
    pub fn samples(self, at: Coordinates, batch: usize) -> impl Iterator<Item = Coordinates> {
        let first = self.lane * batch;
        (first..first + batch).map(move |sample| Coordinates {
            iteration: self.iteration,
            sample: sample as u32,
            step: self.slot,
            ..at
        })
    }
}

/// The order in which a rank uses its batches.
#[derive(Clone, Debug)]
pub struct Order {
    pub slots: Vec<u16>,
    pub lanes: Range<usize>,
    /// Samples of a batch.
    pub batch: usize,
}

impl Order {
    fn after(&self, place: Place) -> Place {
        if place.lane + 1 < self.lanes.end {
            return Place { lane: place.lane + 1, ..place };
        }
        let lane = self.lanes.start;
        let position = self.slots.iter().position(|&s| s == place.slot).map_or(0, |p| p + 1);
        match self.slots.get(position) {
            Some(&slot) => Place { slot, lane, ..place },
            None => Place { iteration: place.iteration + 1, slot: self.slots[0], lane },
        }
    }
}

/// A lane's pictures and captions.
pub struct Batch {
    /// RGB bytes `[n, height, width, 3]`.
    pub pixels: Vec<u8>,
    pub captions: Vec<String>,
    /// Height and width.
    pub size: [u32; 2],
}

struct Job {
    at: Coordinates,
    row: usize,
    reply: Sender<Done>,
}

/// A sample's position in its batch, and its pair.
type Done = (usize, Result<Pair>);

/// A picture, RGB bytes row by row, and its caption.
pub struct Pair {
    pub pixels: Vec<u8>,
    pub caption: String,
}

/// Makes pairs of what shards hold.
pub struct Decoder {
    /// Height and width.
    pub size: [u32; 2],
    drop_words: WordList,
}

impl Decoder {
    pub fn new(size: [u32; 2], drop_words: &str) -> Result<Decoder> {
        Ok(Decoder { size, drop_words: WordList::load(drop_words)? })
    }

    /// `None`: the caption holds a word to drop.
    pub fn pair(&self, image: &[u8], caption: Vec<u8>) -> Result<Option<Pair>> {
        let caption = String::from_utf8(caption).map_err(|_| anyhow!("the caption is not UTF-8"))?.trim().to_string();
        if self.drop_words.matches(&caption) {
            return Ok(None);
        }
        Ok(Some(Pair { pixels: decode_middle(image, self.size)?, caption }))
    }
}

/// What the threads share.
struct Shared {
    shards: Shards,
    decoder: Decoder,
    caption_dropout: f64,
    /// Pairs that cannot be used, named in the log once each.
    bad: Mutex<HashSet<u64>>,
}

/// Gives the batches of a rank; see the module. Dropping it ends the threads.
pub struct Loader {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    at: Coordinates,
    order: Order,
    prefetch: usize,
    ahead: VecDeque<(Place, Receiver<Done>)>,
}

impl Loader {
    /// `at` holds seed and purpose of the draws; `size` is height and width.
    pub fn new(
        shards: Shards,
        settings: &WebdatasetPairs,
        size: [u32; 2],
        caption_dropout: f64,
        at: Coordinates,
        order: Order,
    ) -> Result<Loader> {
        let decoder = Decoder::new(size, &settings.drop_words)?;
        let shared = Arc::new(Shared { shards, decoder, caption_dropout, bad: Mutex::default() });
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..settings.threads {
            let (shared, queue) = (shared.clone(), queue.clone());
            let work = move || loop {
                let job = match queue.lock().expect("no thread panics while it waits").recv() {
                    Ok(job) => job,
                    Err(_) => return,
                };
                // nobody waits any more for a batch that was passed over
                let _ = job.reply.send((job.row, shared.draw(job.at)));
            };
            std::thread::Builder::new().name(format!("pairs-{number}")).spawn(work).context("cannot start a thread")?;
        }
        Ok(Loader { shared, jobs, at, order, prefetch: settings.prefetch, ahead: VecDeque::new() })
    }

    /// Pairs in all shards.
    pub fn pairs(&self) -> u64 {
        self.shared.shards.len()
    }

    /// The batch of `place`; the ones after it are started before this one is waited for.
    ///
    /// # Errors
    /// A shard that cannot be read, or [`ATTEMPTS`] pairs in a row that cannot be used.
    pub fn take(&mut self, place: Place) -> Result<Batch> {
        if self.ahead.front().is_none_or(|(next, _)| *next != place) {
            // the first batch of a run or of a resumed one
            self.ahead.clear();
            self.start(place);
        }
        let (_, waiting) = self.ahead.pop_front().expect("just started");
        let mut last = self.ahead.back().map_or(place, |(place, _)| *place);
        while self.ahead.len() < self.prefetch {
            last = self.order.after(last);
            self.start(last);
        }
        let mut rows: Vec<Option<Pair>> = (0..self.order.batch).map(|_| None).collect();
        for _ in 0..self.order.batch {
            let (row, pair) = waiting.recv().map_err(|_| anyhow!("a thread that reads pairs has ended"))?;
            rows[row] = Some(pair.context("pretraining pairs")?);
        }
        let mut batch = Batch { pixels: Vec::new(), captions: Vec::new(), size: self.shared.decoder.size };
        for pair in rows.into_iter().flatten() {
            batch.pixels.extend(pair.pixels);
            batch.captions.push(pair.caption);
        }
        Ok(batch)
    }

    fn start(&mut self, place: Place) {
        let (reply, waiting) = channel();
        for (row, at) in place.samples(self.at, self.order.batch).enumerate() {
            // fails only when all threads are gone, which `take` notices
            let _ = self.jobs.send(Job { at, row, reply: reply.clone() });
        }
        self.ahead.push_back((place, waiting));
    }
}

impl Shared {
    /// The pair of a sample: the first usable one of those that its random numbers name.
    fn draw(&self, at: Coordinates) -> Result<Pair> {
        let mut stream = at.stream();
        let mut index = stream.below(self.shards.len());
        let without_caption = stream.uniform() < self.caption_dropout;
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            let (image, caption) = self.shards.read(index)?;
            match self.decoder.pair(&image, caption) {
                Ok(Some(pair)) if without_caption => return Ok(Pair { caption: String::new(), ..pair }),
                Ok(Some(pair)) => return Ok(pair),
                Ok(None) => last = "a word to drop".to_string(),
                Err(e) => {
                    let mut bad = self.bad.lock().expect("no thread panics while it counts");
                    last = format!("{}: {e:#}", self.shards.describe(index));
                    if bad.insert(index) {
                        log::warn!("{last}; another pair is taken ({} so far)", bad.len());
                    }
                }
            }
            index = stream.below(self.shards.len());
        }
        bail!("{ATTEMPTS} pairs in a row cannot be used; the last one: {last}")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use image::{ImageFormat, Rgb, RgbImage};

    use super::*;
    use crate::{
        comm::Local,
        image_file::tests::encode,
        pairs::shards::tests::{settings, tar_of},
        random::Purpose,
    };

    /// Shards of 5 pairs; picture and caption say the pair's number. Pair 3 is broken, pair 6 has a word to drop.
    fn write_shards(folder: &Path, shards: u32) {
        for shard in 0..shards {
            let mut members = Vec::new();
            for i in shard * 5..shard * 5 + 5 {
                let mut image = encode(&RgbImage::from_pixel(12, 10, Rgb([i as u8; 3])), ImageFormat::Png);
                if i == 3 {
                    image.truncate(40);
                }
                let caption = if i == 6 { "a Secret".to_string() } else { format!("picture {i}") };
                members.extend([(format!("{i:04}.png"), image), (format!("{i:04}.txt"), caption.into_bytes())]);
            }
            let members: Vec<(&str, &[u8])> = members.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
            std::fs::write(folder.join(format!("{shard:05}.tar")), tar_of(&members)).unwrap();
        }
        std::fs::write(folder.join("words"), "secret\n").unwrap();
    }

    fn loader(folder: &Path, lanes: Range<usize>, prefetch: usize) -> Loader {
        let words = folder.join("words").display().to_string();
        let settings = WebdatasetPairs { prefetch, drop_words: words, ..settings(folder) };
        let shards = Shards::open(&settings, &Local).unwrap();
        let order = Order { slots: vec![0, 1], lanes, batch: 4 };
        Loader::new(shards, &settings, [8, 8], 0.25, Coordinates::new(5, Purpose::PretrainPair), order).unwrap()
    }

    fn all(loader: &mut Loader, from: u32, to: u32) -> Vec<(usize, Vec<u8>, Vec<String>)> {
        let mut batches = Vec::new();
        for iteration in from..to {
            for slot in loader.order.slots.clone() {
                for lane in loader.order.lanes.clone() {
                    let batch = loader.take(Place { iteration, slot, lane }).unwrap();
                    batches.push((lane, batch.pixels, batch.captions));
                }
            }
        }
        batches
    }

    #[test]
    fn the_same_pairs_at_every_number_of_ranks_and_after_a_resume() {
        let folder = tempfile::tempdir().unwrap();
        write_shards(folder.path(), 3);
        let whole = all(&mut loader(folder.path(), 0..4, 3), 0, 4);
        assert_eq!(whole, all(&mut loader(folder.path(), 0..4, 0), 0, 4), "without reading ahead");
        for lanes in [0..1, 2..4] {
            let part = all(&mut loader(folder.path(), lanes.clone(), 5), 0, 4);
            let wanted: Vec<_> = whole.iter().filter(|(lane, ..)| lanes.contains(lane)).cloned().collect();
            assert_eq!(part, wanted, "{lanes:?}");
        }
        assert_eq!(whole[2 * 8..], all(&mut loader(folder.path(), 0..4, 3), 2, 4), "resumed after two iterations");

        let (mut pairs, mut empty) = (HashSet::new(), 0);
        for (_, pixels, captions) in &whole {
            for (pixels, caption) in pixels.chunks(8 * 8 * 3).zip(captions) {
                let number = pixels[0];
                assert!(pixels.iter().all(|&p| p == number) && number < 15, "{number}");
                assert!(number != 3 && number != 6, "pair {number} cannot be used");
                assert!(caption.is_empty() || *caption == format!("picture {number}"), "{caption}");
                pairs.insert(number);
                empty += usize::from(caption.is_empty());
            }
        }
        assert_eq!(pairs.len(), 13, "128 draws reach all usable pairs");
        // binomial, 128 draws of 0.25: 32 ± 4.9
        assert!((12..=52).contains(&empty), "{empty} captions dropped");
    }

    #[test]
    fn shards_without_a_usable_pair_end_the_run_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = tar_of(&[("7.jpg", b"not a picture"), ("7.txt", b"caption")]);
        std::fs::write(folder.path().join("0.tar"), bytes).unwrap();
        std::fs::write(folder.path().join("words"), "secret\n").unwrap();
        let e = loader(folder.path(), 0..1, 1).take(Place { iteration: 0, slot: 0, lane: 0 }).err().unwrap();
        let e = format!("{e:#}");
        assert!(e.contains("64 pairs in a row") && e.contains("0.tar: 7.jpg") && !e.contains('\n'), "{e}");
        let mut gone = loader(folder.path(), 0..1, 0);
        std::fs::remove_file(folder.path().join("0.tar")).unwrap();
        let e = gone.take(Place { iteration: 0, slot: 0, lane: 0 }).err().unwrap();
        assert!(format!("{e:#}").contains("cannot read"), "{e:#}");
    }

    /// Pictures made by img2dataset's own code, with the parquet file beside them.
    #[test]
    fn a_shard_in_img2datasets_layout() {
        let Some(data) = std::env::var_os("RLDIFF_TEST_DATA") else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with constructed/webdataset");
            return;
        };
        let folder = Path::new(&data).join("constructed/webdataset");
        let shards = Shards::open(&settings(&folder), &Local).unwrap();
        assert_eq!(shards.len(), 4);
        for index in 0..4 {
            let (image, caption) = shards.read(index).unwrap();
            assert_eq!(decode_middle(&image, [512, 512]).unwrap().len(), 512 * 512 * 3);
            assert!(!caption.is_empty());
        }
    }
}
