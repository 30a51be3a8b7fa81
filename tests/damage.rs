//! Damaged checkpoints: every flipped bit and every truncation is noticed before HDF5 sees the file, and the checkpoint
//! before is used. The checkpoints are written by three ranks: `mpirun` starts this very executable.

mod common;

use std::{fs, path::Path, time::Duration};

use common::{empty_folder, mpirun, one_at_a_time, run_within};
use rldiff::{
    comm::{self, Local},
    store::{self, CheckpointRef, Keep, ParameterEntry},
};
use serde_json::json;

const FOLDER: &str = "RLDIFF_TEST_FOLDER";
const RANKS: usize = 3;

/// Not a test of its own: saves the checkpoints 1 and 2.
#[test]
#[ignore = "run by mpirun from the other tests"]
fn rank_body() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        println!("rank_body: {FOLDER} is not set, nothing to do");
        return;
    };
    let comm = comm::start().unwrap();
    for iteration in 1..=2 {
        let values: Vec<f32> = (0..301).map(|i| (i as f32 * 0.37 + iteration as f32).sin()).collect();
        let meta = json!({"optimizer_steps": 5, "share": 0.1});
        let layout = [ParameterEntry { name: "conv.weight".into(), shape: vec![301], offset: 0 }];
        let vectors = vec![("weights", &values[..]), ("exp_avg", &values[..])];
        let checkpoint = CheckpointRef { iteration, meta: &meta, config_toml: "[run]\n", layout: &layout, vectors };
        store::save(Path::new(&folder), &checkpoint, Keep { last: 9, every: 0 }, comm.as_ref()).unwrap();
    }
}

/// Expects the newest checkpoint to be refused with a line that names `file`, and the one before to be used.
fn is_noticed(folder: &Path, file: &str, what: &str) {
    let loaded = store::load_latest(folder, &Local).unwrap_or_else(|e| panic!("{what}: {e:#}"));
    let loaded = loaded.unwrap_or_else(|| panic!("{what}: no checkpoint at all"));
    assert_eq!((loaded.checkpoint.iteration, loaded.warnings.len()), (1, 1), "{what}");
    assert!(loaded.warnings[0].contains("iteration-000002"), "{what}: {}", loaded.warnings[0]);
    assert!(loaded.warnings[0].contains(file), "{what}: {}", loaded.warnings[0]);
}

fn damage(flips: usize, name: &str) {
    let _alone = one_at_a_time();
    let folder = empty_folder(name);
    let mut ranks = mpirun(RANKS);
    ranks.arg(std::env::current_exe().unwrap()).args(["--ignored", "--exact", "rank_body"]).env(FOLDER, &folder);
    run_within(ranks, Duration::from_secs(120)).expect_success("saving");
    let newest = folder.join("iteration-000002");
    let mut files: Vec<String> =
        fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["manifest.json", "shard-000.h5", "shard-001.h5", "shard-002.h5"]);
    let sound: Vec<Vec<u8>> = files.iter().map(|file| fs::read(newest.join(file)).unwrap()).collect();

    // a linear congruential generator (Knuth's constants): which file, byte and bit
    let mut state = 2401_12244u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut per_file = vec![0; files.len()];
    for _ in 0..flips {
        let which = draw(files.len());
        let (byte, bit) = (draw(sound[which].len()), draw(8));
        let mut damaged = sound[which].clone();
        damaged[byte] ^= 1 << bit;
        fs::write(newest.join(&files[which]), &damaged).unwrap();
        is_noticed(&folder, &files[which], &format!("{}: bit {bit} of byte {byte}", files[which]));
        fs::write(newest.join(&files[which]), &sound[which]).unwrap();
        per_file[which] += 1;
    }
    let mut truncations = 0;
    for (file, sound) in files.iter().zip(&sound) {
        for length in (0..sound.len()).step_by(512) {
            fs::write(newest.join(file), &sound[..length]).unwrap();
            is_noticed(&folder, file, &format!("{file} cut to {length} bytes"));
            truncations += 1;
        }
        fs::remove_file(newest.join(file)).unwrap();
        // a folder without its manifest is named as such
        let loaded = store::load_latest(&folder, &Local).unwrap().unwrap();
        assert_eq!(loaded.checkpoint.iteration, 1, "without {file}");
        fs::write(newest.join(file), sound).unwrap();
    }
    assert_eq!(store::load_latest(&folder, &Local).unwrap().unwrap().checkpoint.iteration, 2, "restored");
    println!(
        "{flips} of {flips} single-bit flips ({per_file:?} of {files:?}) and {truncations} of {truncations} truncations \
         were noticed, and the checkpoint before was loaded"
    );
    assert!(truncations > 20, "{truncations}");
}

#[test]
fn damaged_checkpoints_are_noticed() {
    damage(1_000, "damage");
}

#[test]
#[ignore = "long: 10,000 flips"]
fn ten_thousand_damaged_checkpoints_are_noticed() {
    damage(10_000, "damage-long");
}
