//! The `kvcellar` command.

fn main() {
    end_where_nobody_reads();
    std::process::exit(kvcellar_command::run(std::env::args().skip(1).collect()));
}

/// Whoever closes the pipe that a command prints into ends it, without a word; of a full disk it
/// says so. `println!` would panic.
fn end_where_nobody_reads() {
    // What a shell shows of a process that its closed pipe has ended.
    const BY_CLOSED_PIPE: i32 = 128 + libc::SIGPIPE;
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let failed = panic.payload_as_str().and_then(|message| message.strip_prefix("failed printing to stdout: "));
        match failed {
            Some(why) if why.contains("Broken pipe") => std::process::exit(BY_CLOSED_PIPE),
            Some(why) => {
                eprintln!("kvcellar: standard output: {why}");
                std::process::exit(1);
            }
            None => usual(panic),
        }
    }));
}
