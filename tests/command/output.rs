//! Standard output that takes nothing.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};

fn listing(output: impl Into<Stdio>) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvcellar"));
    command.args(["pool", "ls", "--pool-dir", "/dev/shm"]).stdout(output).stderr(Stdio::piped());
    command.spawn().expect("the command").wait_with_output().expect("its end")
}

#[test]
fn a_full_disk_is_said() {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let ended = listing(full);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.starts_with("kvcellar: standard output: No space left") && !said.contains("panicked"), "{said}");
    assert_eq!(ended.status.code(), Some(1));
}

#[test]
fn a_closed_pipe_ends_it_without_a_word() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let ended = listing(writer);
    assert_eq!((ended.status.code(), ended.stderr.len()), (Some(128 + 13), 0));
}
