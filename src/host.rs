//! The machine that this process runs on, by name.

/// Bytes of a host's name in the names of temporary files.
const IN_FILE_NAMES: usize = 32;

/// What the machine calls itself; None where it has no name.
pub fn name() -> Option<String> {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is as long as said; a name that does not fit is cut, and the last byte stays 0.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let name: Vec<u8> = name.into_iter().take_while(|&byte| byte != 0).collect();
    (!name.is_empty()).then(|| String::from_utf8_lossy(&name).into_owned())
}

/// What a temporary file of this process has in its name, on a file system that several hosts share: the host and the
/// process's number, which another host may have given as well. Without dots.
pub fn process_mark() -> String {
    mark(&name().unwrap_or_default(), std::process::id())
}

fn mark(host: &str, process: u32) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    // the end tells nodes of one cluster apart where the name is too long, unless that is the domain
    let short = host.split('.').next().unwrap_or_default();
    let host: String = short.chars().map(plain).collect();
    format!("{}-{process}", &host[host.len().saturating_sub(IN_FILE_NAMES)..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_one_number_on_two_hosts_have_two_marks() {
        assert_ne!(mark("n1", 77), mark("n2", 77));
        assert_eq!(mark("gpu-07.cluster.example", 77), "gpu-07-77");
        let long = |n| mark(&format!("{}{n}", "rack".repeat(20)), 4_194_304);
        assert!(long(1) != long(2) && long(1).len() <= IN_FILE_NAMES + 8, "{}", long(1));
        assert_eq!(mark("ä/b", 1), "--b-1");
        let own = process_mark();
        assert!(own.ends_with(&format!("-{}", std::process::id())) && !own.contains(['.', '/']), "{own}");
    }
}
