//! The `kvcellar` command.

fn main() {
    std::process::exit(kvcellar_command::run(std::env::args().skip(1).collect()));
}
