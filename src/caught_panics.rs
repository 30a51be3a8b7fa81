//! Panics of other people's code as errors.
//!
//! A panic ends all ranks ([`crate::comm::abort_world_on_panic`]). Code that is known to panic on damaged input, though,
//! runs inside [`catch`], which the hook leaves alone.

use std::{any::Any, cell::Cell, panic::AssertUnwindSafe};

use anyhow::{anyhow, Result};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// What a panic says.
pub fn message(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "panic without a message",
    }
}

/// Whether a panic of this thread is somebody's to catch.
pub fn are_caught() -> bool {
    CATCHING.get()
}

/// `work`'s result; a panic in it is an error of one line. What `work` was changing when it panicked is not to be used.
pub fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = CATCHING.replace(true);
    let result = std::panic::catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(before);
    result.unwrap_or_else(|payload| {
        let words: Vec<&str> = message(payload.as_ref()).split_whitespace().collect();
        Err(anyhow!("{}", words.join(" ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_one_line() {
        assert_eq!(catch(|| Ok(3)).unwrap(), 3);
        assert!(catch(|| -> Result<()> { Err(anyhow!("plain")) }).unwrap_err().to_string() == "plain");
        let length = "abc".len();
        let e = catch(|| -> Result<u8> { Ok([1u8, 2, 3][length]) }).unwrap_err().to_string();
        assert!(e.contains("index out of bounds") && !are_caught(), "{e}");
        assert_eq!(catch(|| -> Result<()> { panic!("two\n  lines") }).unwrap_err().to_string(), "two lines");
    }
}
