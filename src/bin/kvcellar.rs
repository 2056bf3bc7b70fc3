//! The `kvcellar` command.

fn main() {
    std::process::exit(kvcellar::cli::run(std::env::args().skip(1).collect()));
}
