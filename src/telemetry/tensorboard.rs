//! TensorBoard event files: TFRecord frames around protobuf `Event` messages.
//!
//! A frame is `length: u64 · masked crc32c(length): u32 · data · masked crc32c(data): u32`, little-endian, with
//! mask(c) = rotate_right(c, 15) + 0xa282ead8. The messages below hold the few fields that we write, under the field
//! numbers of TensorFlow's event.proto and summary.proto. Scalars become f32; `metrics.jsonl` has every digit.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{bail, Context, Result};
use prost::Message;

use super::metrics::Metrics;
use super::picture::{encode_png, Picture};
use crate::cannot_write::CannotWrite;

/// Added to the rotated checksum, so that a checksum over data that contains checksums stays a good one.
const MASK_DELTA: u32 = 0xa282_ead8;
/// `SessionLog.status`: readers drop what earlier files hold of this step and later ones.
const SESSION_START: i32 = 1;
/// `Summary.Image.colorspace`
const RGB: i32 = 3;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Writes one event file. Every call leaves the file complete up to its event.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts `events.out.tfevents.<unix time>.<host>` in `folder`; a number is appended if that name is taken.
    /// `iterations_done` > 0 for a resumed run: TensorBoard then forgets the later steps of the earlier files.
    pub fn create(folder: &Path, iterations_done: u64) -> Result<Self> {
        let (file, path) = create_file(folder)?;
        let mut writer = EventWriter { file: BufWriter::new(file), path };
        writer.write(Event { file_version: Some("brain.Event:2".to_owned()), ..now(0) })?;
        if iterations_done > 0 {
            writer.write(Event { session_log: Some(SessionLog { status: SESSION_START }), ..now(iterations_done) })?;
        }
        Ok(writer)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All numbers of an iteration, as scalars at step `metrics.iteration`.
    pub fn metrics(&mut self, metrics: &Metrics) -> Result<()> {
        let scalar = |(tag, value): (&str, f64)| Value {
            tag: tag.to_owned(),
            simple_value: Some(value as f32),
            ..Default::default()
        };
        let summary = Summary { value: metrics.iter().map(scalar).collect() };
        self.write(Event { summary: Some(summary), ..now(metrics.iteration) })
    }

    /// One picture under `tag` at `step`.
    pub fn picture(&mut self, step: u64, tag: &str, picture: &Picture) -> Result<()> {
        let image = Image {
            height: i32::try_from(picture.height()).context("picture too high")?,
            width: i32::try_from(picture.width()).context("picture too wide")?,
            colorspace: RGB,
            encoded_image_string: encode_png(picture, &[])?,
        };
        let value = Value { tag: tag.to_owned(), image: Some(image), ..Default::default() };
        self.write(Event { summary: Some(Summary { value: vec![value] }), ..now(step) })
    }

    fn write(&mut self, event: Event) -> Result<()> {
        let record = frame(&event.encode_to_vec());
        let written = self.file.write_all(&record).and_then(|()| self.file.flush());
        written.context(CannotWrite::file(&self.path))
    }
}

/// An empty event of this moment at `step`.
fn now(step: u64) -> Event {
    let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    Event { wall_time, step: i64::try_from(step).unwrap_or(i64::MAX), ..Default::default() }
}

/// Never opens an existing file: two starts within one second must not share one.
fn create_file(folder: &Path) -> Result<(File, PathBuf)> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = format!("events.out.tfevents.{seconds:010}.{}", host_name());
    for attempt in 0..1000 {
        let path = folder.join(if attempt == 0 { name.clone() } else { format!("{name}.{attempt}") });
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error).context(CannotWrite::file(&path)),
        }
    }
    bail!("{}: a thousand event files of the same second", folder.display())
}

/// The machine's name, or "localhost" where it cannot be had.
fn host_name() -> String {
    crate::host::name().map_or("localhost".to_owned(), |name| name.replace('/', "_"))
}

/// One TFRecord.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(MASK_DELTA)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::picture::decode_png;

    /// Every event of a file, its checksums verified by the definition: masked crc32c, bit by bit.
    fn read_events(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let (header, tail) = rest.split_at(12);
            let (data, tail) = tail.split_at(length);
            let (checksum, tail) = tail.split_at(4);
            assert_eq!(slow_masked_crc(&header[..8]).to_le_bytes(), header[8..]);
            assert_eq!(slow_masked_crc(data).to_le_bytes(), checksum);
            events.push(Event::decode(data).unwrap());
            rest = tail;
        }
        events
    }

    fn slow_masked_crc(data: &[u8]) -> u32 {
        let mut crc = !0_u32;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
            }
        }
        (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
    }

    #[test]
    fn checksums_have_their_known_values() {
        // the check value of CRC-32C (RFC 3720, Castagnoli) over "123456789" is 0xe3069283
        let expected = 0xe306_9283_u32.rotate_right(15).wrapping_add(MASK_DELTA);
        assert_eq!(masked_crc(b"123456789"), expected);
        // the first twelve bytes of any file that TensorFlow starts with its 24-byte version event
        assert_eq!(frame(&[0; 24])[..12], *b"\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22");
    }

    fn write_example(folder: &Path) -> (EventWriter, Picture) {
        let mut writer = EventWriter::create(folder, 0).unwrap();
        for iteration in 0..3 {
            let mut metrics = Metrics::new(iteration);
            metrics.set("composition/reward_mean", 0.5 + iteration as f64 / 8.0);
            metrics.set("ratio_drift", 0.0);
            writer.metrics(&metrics).unwrap();
        }
        let picture = Picture::from_fn(5, 3, |x, y| [x as u8 * 50, y as u8 * 80, 7]);
        writer.picture(2, "samples/composition", &picture).unwrap();
        (writer, picture)
    }

    #[test]
    fn decodes_to_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, picture) = write_example(folder.path());
        let name = writer.path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents.1") || name.starts_with("events.out.tfevents.2"), "{name}");

        let events = read_events(writer.path());
        assert_eq!(events.len(), 5);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert!(events.windows(2).all(|pair| pair[0].wall_time <= pair[1].wall_time) && events[0].wall_time > 1.5e9);
        for (iteration, event) in events[1..4].iter().enumerate() {
            assert_eq!(event.step, iteration as i64);
            let values = &event.summary.as_ref().unwrap().value;
            assert_eq!(values[0].tag, "composition/reward_mean");
            assert_eq!(values[0].simple_value, Some(0.5 + iteration as f32 / 8.0));
            // zero must be written out: an absent value is not a zero to TensorBoard
            assert_eq!(values[1].simple_value, Some(0.0));
        }
        let image = events[4].summary.as_ref().unwrap().value[0].image.clone().unwrap();
        assert_eq!((image.width, image.height, image.colorspace), (5, 3, 3));
        assert_eq!(decode_png(&image.encoded_image_string).unwrap().0, picture);
    }

    #[test]
    fn a_resumed_run_starts_a_second_file_that_cuts_off_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let (first, _) = write_example(folder.path());
        let second = EventWriter::create(folder.path(), 2).unwrap();
        assert_ne!(first.path(), second.path());
        let events = read_events(second.path());
        assert_eq!(events[1].step, 2);
        assert_eq!(events[1].session_log, Some(SessionLog { status: SESSION_START }));
    }

    /// TensorBoard's own reader, where there is a Python that has it: set RLDIFF_TEST_PYTHON to that interpreter.
    #[test]
    fn tensorboard_reads_it() {
        let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON") else {
            eprintln!("SKIPPED tensorboard_reads_it: RLDIFF_TEST_PYTHON names no Python with tensorboard");
            return;
        };
        const READER: &str = r#"
import sys
try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    print("ABSENT", error)
    sys.exit()
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0})
events.Reload()
print(events.Tags()["scalars"], events.Tags()["images"])
print([(e.step, e.value) for e in events.Scalars("composition/reward_mean")])
print([(e.step, e.width, e.height) for e in events.Images("samples/composition")])
"#;
        let folder = tempfile::tempdir().unwrap();
        write_example(folder.path());
        // resumed from 2 iterations: step 2 of the first file, its picture too, must make room for the new one
        let mut resumed = EventWriter::create(folder.path(), 2).unwrap();
        let mut metrics = Metrics::new(2);
        metrics.set("composition/reward_mean", -1.0);
        resumed.metrics(&metrics).unwrap();
        resumed.picture(3, "samples/composition", &Picture::from_fn(2, 4, |_, _| [0; 3])).unwrap();

        let output = std::process::Command::new(python).args(["-c", READER]).arg(folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        if text.starts_with("ABSENT") {
            eprintln!("SKIPPED tensorboard_reads_it: {}", text.trim());
            return;
        }
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "['composition/reward_mean', 'ratio_drift'] ['samples/composition']",
                "[(0, 0.5), (1, 0.625), (2, -1.0)]",
                "[(3, 2, 4)]",
            ]
        );
    }
}
