use std::{fs, path::Path};

use serde_json::json;

use super::*;
use crate::{
    comm::Local,
    store::{digest, inspect, state_digest},
};

const LAYOUT: [(&str, usize); 2] = [("conv.weight", 60), ("conv.bias", 41)];

struct State {
    meta: Value,
    layout: Vec<ParameterEntry>,
    weights: Vec<f32>,
    moments: Vec<f32>,
}

fn state(seed: f32) -> State {
    let mut offset = 0;
    let layout = LAYOUT.map(|(name, count)| {
        let entry = ParameterEntry { name: name.into(), shape: vec![count], offset };
        offset += count;
        entry
    });
    let values = |scale: f32| (0..101).map(|i| (i as f32 * scale + seed).sin()).collect();
    State {
        meta: json!({"optimizer_steps": 5, "share": 0.1 + f64::from(seed)}),
        layout: layout.to_vec(),
        weights: values(1.1),
        moments: values(0.3),
    }
}

fn store(folder: &Path, iteration: u64, seed: f32, keep: usize) -> SaveReport {
    let s = state(seed);
    let checkpoint = CheckpointRef {
        iteration,
        meta: &s.meta,
        config_toml: "[run]\nseed = 1\n",
        layout: &s.layout,
        vectors: vec![("weights", &s.weights), ("exp_avg", &s.moments)],
    };
    save(folder, &checkpoint, Keep { last: keep, every: 0 }, &Local).unwrap()
}

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    assert!(load_latest(folder.path(), &Local).unwrap().is_none());
    store(folder.path(), 3, 0.25, 9);
    let report = store(folder.path(), 7, 0.5, 9);
    let loaded = load_latest(folder.path(), &Local).unwrap().unwrap();
    let s = state(0.5);
    assert_eq!((loaded.checkpoint.iteration, &loaded.path), (7, &report.path));
    assert_eq!(loaded.checkpoint.vector("weights").unwrap(), s.weights);
    assert_eq!(loaded.checkpoint.vector("exp_avg").unwrap(), s.moments);
    assert_eq!(loaded.checkpoint.layout, s.layout);
    assert_eq!(loaded.checkpoint.meta, s.meta);
    assert_eq!(loaded.checkpoint.config_toml, "[run]\nseed = 1\n");
    assert!(loaded.warnings.is_empty());
    assert_eq!(load(&folder.path().join("iteration-000003"), &Local).unwrap().checkpoint.iteration, 3);
}

#[test]
fn only_the_newest_stay_and_nothing_temporary() {
    let folder = tempfile::tempdir().unwrap();
    for iteration in 1..=5 {
        store(folder.path(), iteration, 0.0, 2);
    }
    let mut names: Vec<String> =
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["iteration-000004", "iteration-000005"]);
    // saved again after falling back: replaced
    store(folder.path(), 5, 3.0, 2);
    let again = load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint;
    assert_eq!(again.vector("weights").unwrap(), state(3.0).weights);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn every_so_many_iterations_one_stays() {
    let folder = tempfile::tempdir().unwrap();
    let s = state(0.0);
    for iteration in 1..=9 {
        let checkpoint = CheckpointRef {
            iteration,
            meta: &s.meta,
            config_toml: "",
            layout: &s.layout,
            vectors: vec![("weights", &s.weights)],
        };
        save(folder.path(), &checkpoint, Keep { last: 2, every: 4 }, &Local).unwrap();
    }
    let kept: Vec<u64> = list(folder.path()).unwrap().into_iter().map(|(iteration, _)| iteration).collect();
    assert_eq!(kept, [4, 8, 9]);
}

/// A run that fell back past damaged checkpoints must not remove its new one for being older than those.
#[test]
fn what_is_saved_outlives_what_was_saved_later_before() {
    let folder = tempfile::tempdir().unwrap();
    for iteration in [1, 5, 6] {
        store(folder.path(), iteration, 0.0, 9);
    }
    fs::create_dir(folder.path().join("iteration-000002.replaced")).unwrap();
    fs::write(folder.path().join("iteration-000002.replaced/shard-000.h5"), b"interrupted").unwrap();
    store(folder.path(), 2, 1.0, 1);
    store(folder.path(), 2, 2.0, 1);
    let newest = load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint;
    assert_eq!((newest.iteration, newest.vector("weights").unwrap()), (2, &state(2.0).weights[..]));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Flips one bit in every 97th byte position of every file in turn: each must be noticed, and the one before used.
#[test]
fn every_damage_is_noticed_before_hdf5_sees_the_file() {
    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), 1, 0.0, 9);
    let newest = store(folder.path(), 2, 1.0, 9).path;
    for file in ["shard-000.h5", "manifest.json"] {
        let path = newest.join(file);
        let sound = fs::read(&path).unwrap();
        for position in (0..sound.len()).step_by(97) {
            let mut damaged = sound.clone();
            damaged[position] ^= 4;
            fs::write(&path, &damaged).unwrap();
            let loaded = match load_latest(folder.path(), &Local) {
                Ok(loaded) => loaded.unwrap(),
                Err(e) => panic!("{file} at {position}: {e:#}"),
            };
            assert_eq!(loaded.checkpoint.iteration, 1, "{file} at {position}");
            assert!(loaded.warnings[0].contains("iteration-000002"), "{:?}", loaded.warnings);
            if file == "shard-000.h5" {
                assert!(loaded.warnings[0].contains("shard-000.h5 (rank 0)"), "{:?}", loaded.warnings);
            }
        }
        for length in [0, sound.len() / 2, sound.len() - 1] {
            fs::write(&path, &sound[..length]).unwrap();
            assert_eq!(load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint.iteration, 1);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint.iteration, 1);
        fs::write(&path, &sound).unwrap();
    }
    fs::remove_dir_all(folder.path().join("iteration-000001")).unwrap();
    fs::write(newest.join("shard-000.h5"), b"x").unwrap();
    let error = format!("{:#}", load_latest(folder.path(), &Local).unwrap_err());
    assert!(error.contains("iteration-000002") && error.contains("rank 0"), "{error}");
}

#[test]
fn an_interrupted_save_is_not_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), 1, 0.0, 9);
    let partial = folder.path().join("iteration-000002.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("shard-000.h5"), b"half").unwrap();
    assert_eq!(load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint.iteration, 1);
    store(folder.path(), 2, 1.0, 9);
    assert!(!partial.exists());
    assert_eq!(load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint.iteration, 2);
}

#[test]
fn the_digest_tells_states_apart() {
    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), 1, 0.0, 9);
    let whole = digest(folder.path()).unwrap();
    assert_eq!((whole.len(), &whole), (64, &digest(&folder.path().join("iteration-000001")).unwrap()));
    let mut checkpoint = load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint;
    assert_eq!(state_digest(&checkpoint).unwrap(), whole);
    checkpoint.vectors[1].1[40] = f32::from_bits(checkpoint.vectors[1].1[40].to_bits() ^ 1);
    assert_ne!(state_digest(&checkpoint).unwrap(), whole);
    assert!(inspect(folder.path()).unwrap().contains(&whole));
    let shard = inspect(&folder.path().join("iteration-000001/shard-000.h5")).unwrap();
    assert!(shard.contains("weights") && shard.contains("[101]"), "{shard}");
    assert!(digest(&folder.path().join("nothing")).unwrap_err().to_string().contains("nothing"));
}

/// f32 and f64 survive, also the unusual ones.
#[test]
fn unusual_numbers_survive() {
    let folder = tempfile::tempdir().unwrap();
    let weights = [0.0, -0.0, f32::MIN_POSITIVE / 8.0, f32::MAX, f32::INFINITY, f32::NAN];
    let meta = json!({"a": 0.1f64 + 0.2, "b": f64::MIN_POSITIVE, "c": u64::MAX});
    let checkpoint =
        CheckpointRef { iteration: 0, meta: &meta, config_toml: "", layout: &[], vectors: vec![("weights", &weights)] };
    save(folder.path(), &checkpoint, Keep { last: 1, every: 0 }, &Local).unwrap();
    let loaded = load_latest(folder.path(), &Local).unwrap().unwrap().checkpoint;
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(loaded.vector("weights").unwrap()), bits(&weights));
    assert_eq!(loaded.meta, meta);
}

/// Checkpoints, and trajectory shards beside them, from several threads at once: HDF5 itself allows only one, so this
/// crashes or mixes up files unless every call takes the crate's lock.
#[test]
fn threads_may_write_and_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u16 {
            let own = folder.path().join(thread.to_string());
            scope.spawn(move || {
                for iteration in 1..=20 {
                    let seed = f32::from(thread) + iteration as f32 / 32.0;
                    store(&own, iteration, seed, 2);
                    let loaded = load_latest(&own, &Local).unwrap().unwrap().checkpoint;
                    assert_eq!(
                        (loaded.iteration, loaded.vector("weights").unwrap()),
                        (iteration, &state(seed).weights[..])
                    );
                }
            });
        }
    });
}
