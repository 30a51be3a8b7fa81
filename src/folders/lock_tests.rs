use std::{fs::File, time::Duration};

use super::*;

/// The same rules, a thousand times as fast.
const FAST: Times = Times {
    renewal: Duration::from_millis(20),
    dead: Duration::from_millis(400),
    watched: Duration::from_millis(200),
    forgotten: Duration::from_secs(3600),
    own_job: Duration::from_millis(600),
    look: Duration::from_millis(10),
};

fn take(folder: &Path) -> Result<FolderLock> {
    FolderLock::take_within(folder, "train", &FAST)
}

/// Puts a lock there that nobody renews; of another machine where `elsewhere`.
fn leave_lock(folder: &Path, elsewhere: bool, age: Duration) {
    let mut owner = Owner::this_process("train");
    owner.host = "n7".into();
    if elsewhere {
        owner.boot = "another".into();
    } else {
        owner.started += 1;
    }
    let path = folder.join(LOCK);
    fs::write(&path, serde_json::to_vec(&owner).unwrap()).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::now() - age).unwrap();
}

fn left(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn one_holds_a_folder_and_leaves_nothing() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("runs/a");
    let lock = take(&folder).unwrap();
    let error = take(&folder).err().unwrap().to_string();
    let me = format!("runs/a is in use: rldiff train, process {} on ", std::process::id());
    assert!(error.contains(&me) && error.contains(", since 20"), "{error}");
    // by another name, too
    std::os::unix::fs::symlink(&folder, outer.path().join("link")).unwrap();
    assert!(take(&outer.path().join("link")).is_err());
    assert_eq!(left(&folder), [LOCK]);
    lock.check().unwrap();
    drop(lock);
    assert!(!outer.path().join("runs").exists(), "folders that nothing came into are removed");
    let lock = take(&folder).unwrap();
    fs::write(folder.join("result"), b"1").unwrap();
    drop(lock);
    assert_eq!(left(&folder), ["result"]);
}

#[test]
fn a_lock_dies_with_its_process_and_one_of_many_takes_it_over() {
    let outer = tempfile::tempdir().unwrap();
    for round in 0..60 {
        let folder = outer.path().join(round.to_string());
        fs::create_dir(&folder).unwrap();
        leave_lock(&folder, round % 2 == 1, Duration::from_secs(if round % 2 == 1 { 4000 } else { 0 }));
        let barrier = std::sync::Barrier::new(4);
        let taken: Vec<Result<FolderLock>> = std::thread::scope(|scope| {
            let one = || {
                barrier.wait();
                take(&folder)
            };
            let all: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let errors: Vec<String> = taken.iter().filter_map(|t| t.as_ref().err()).map(|e| format!("{e:#}")).collect();
        assert_eq!(errors.len(), 3, "round {round}: {errors:?}");
        assert!(errors.iter().all(|e| e.contains("is in use")), "{errors:?}");
        taken.iter().flatten().for_each(|lock| lock.check().unwrap());
        assert_eq!(left(&folder), [LOCK], "round {round}");
        drop(taken);
        assert!(left(&folder).is_empty());
    }
}

#[test]
fn who_won_the_right_and_died_stops_nobody() {
    let outer = tempfile::tempdir().unwrap();
    leave_lock(outer.path(), false, Duration::ZERO);
    let dead = fs::read(outer.path().join(LOCK)).unwrap();
    let token = Owner::parse(&dead).unwrap().token;
    let mut winner = Owner::this_process("train");
    winner.started += 1;
    let right = outer.path().join(format!(".{LOCK}.after-{token}"));
    fs::write(right, serde_json::to_vec(&winner).unwrap()).unwrap();
    let lock = take(outer.path()).unwrap();
    lock.check().unwrap();
    assert_eq!(left(outer.path()), [LOCK]);
}

#[test]
fn a_lock_of_another_host_dies_when_it_is_not_renewed() {
    let outer = tempfile::tempdir().unwrap();
    // renewed lately: refused at once
    leave_lock(outer.path(), true, Duration::from_secs(1));
    let started = Instant::now();
    let error = FolderLock::take(outer.path(), "train").err().unwrap().to_string();
    assert!(error.contains("process") && error.contains("on n7"), "{error}");
    assert!(started.elapsed() < TIMES.renewal);
    // not for long, or by a clock that is ahead: watched first
    for age in [Duration::from_secs(2), Duration::ZERO] {
        leave_lock(outer.path(), true, age);
        if age.is_zero() {
            let path = outer.path().join(LOCK);
            let ahead = std::time::SystemTime::now() + Duration::from_secs(1000);
            File::options().write(true).open(&path).unwrap().set_modified(ahead).unwrap();
        }
        let started = Instant::now();
        drop(take(outer.path()).unwrap());
        assert!(started.elapsed() >= FAST.watched, "{age:?}");
    }
    // one that is renewed lives, whatever the clocks say
    leave_lock(outer.path(), true, Duration::from_secs(2));
    let path = outer.path().join(LOCK);
    let is_judged = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut owner = Owner::parse(&fs::read(&path).unwrap()).unwrap();
            while !is_judged.load(std::sync::atomic::Ordering::Relaxed) {
                owner.renewals += 1;
                // the clock of that host is behind: its file stays old
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&serde_json::to_vec(&owner).unwrap(), 0).unwrap();
                file.set_modified(std::time::SystemTime::now() - Duration::from_secs(2)).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let judged = take(outer.path());
        is_judged.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(judged.is_err());
    });
}

#[test]
fn an_owner_renews_and_notices_that_the_folder_is_anothers() {
    let outer = tempfile::tempdir().unwrap();
    let lock = take(outer.path()).unwrap();
    let path = outer.path().join(LOCK);
    let renewals = || Owner::parse(&fs::read(&path).unwrap_or_default()).map_or(0, |owner| owner.renewals);
    let started = Instant::now();
    while renewals() < 12 {
        assert!(started.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    // deleted by hand: it comes back
    fs::remove_file(&path).unwrap();
    lock.check().unwrap();
    while renewals() == 0 {
        assert!(started.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut held = of(&lock.held);
    let other = Owner { host: "n8".into(), ..Owner::this_process("train") };
    fs::write(&path, serde_json::to_vec(&other).unwrap()).unwrap();
    let error = held.renew().unwrap_err().to_string();
    assert!(error.contains("was taken over while this run stood still") && error.contains("on n8"), "{error}");
    // put back before the renewing thread looks: it would end this process
    fs::write(&path, serde_json::to_vec(&held.owner).unwrap()).unwrap();
    drop(held);
    drop(lock);
    assert!(left(outer.path()).is_empty());
}

#[test]
fn a_held_folder_is_set_aside_with_what_is_in_it() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("joint");
    for n in 1..=2 {
        let mut lock = take(&root).unwrap();
        fs::write(root.join("a"), n.to_string()).unwrap();
        lock.set_aside().unwrap();
        let aside = outer.path().join(format!("joint.{n}"));
        assert_eq!(fs::read_to_string(aside.join("a")).unwrap(), n.to_string());
        assert_eq!((left(&aside), left(&root)), (vec!["a".to_string()], vec![LOCK.to_string()]));
        assert!(take(&root).is_err());
    }
    assert!(!root.exists());
}

#[test]
fn another_programs_file_of_that_name_stays() {
    let outer = tempfile::tempdir().unwrap();
    let path = outer.path().join(LOCK);
    fs::write(&path, b"mine").unwrap();
    let error = take(outer.path()).err().unwrap().to_string();
    assert!(error.contains("is no lock that rldiff can read"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    assert_eq!(left(outer.path()), [LOCK]);
}
