//! The `kvcellar` command: options, and what is printed. The work is the other crates'.

mod answer;
pub mod clients;
pub mod descriptors;
pub mod doctor;
mod engine_api;
pub mod events;
pub mod forget;
pub mod health;
pub mod index;
mod input;
pub mod logging;
pub mod pool;
pub mod route;
pub mod store;
pub mod top;
pub mod warm;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// KV-cache offload engine for vLLM.
#[derive(Debug, Parser)]
#[command(name = "kvcellar", version, about)]
struct CommandLine {
    /// How log lines are written to standard error.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    part: Topic,
}

#[derive(Debug, Subcommand)]
enum Topic {
    /// Shared host pools of this user: show them, remove leftovers.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Stores of this user on disk: show, check and remove them.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Says whether this machine, and a directory meant as `nvme_dir`, suit KV Cellar. Exit code 1
    /// when something does not work.
    Doctor(doctor::DoctorOptions),
    /// Forgets everything of requests with a `cache_salt`, in memory and on disk, and overwrites
    /// its bytes: of a running engine, or of pools and stores that no engine uses. Exit code 1 when
    /// something may be left.
    Forget(forget::ForgetOptions),
    /// Sends prompts from a file to an engine or a router, so that their KV is there before
    /// anybody asks. Exit code 1 when one failed.
    Warm(warm::WarmOptions),
    /// An index of a fleet's KV blocks.
    #[command(subcommand)]
    Index(IndexCommand),
    /// Sends each request of a fleet to the engine that saves the most work.
    Route(Box<route::Options>),
    /// A fleet in a terminal: engines, tiers, hit rates, queue and decisions, as a router sees
    /// them.
    Top(top::Options),
    /// Events of engines: watch, record, play again, make up.
    #[command(subcommand)]
    Events(events::EventsCommand),
    /// Replays a recorded or made-up workload over tiers of a size, with each policy.
    Simulate(Box<kvcellar_simulate::SimulateOptions>),
    /// What this machine gives.
    #[command(subcommand)]
    Bench(kvcellar_bench::Benchmark),
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Lists pools: name, size, who uses them.
    Ls {
        /// Shared-memory directory.
        #[arg(long, default_value = "/dev/shm")]
        pool_dir: PathBuf,
        /// JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Removes pools that no engine uses.
    Rm {
        /// Names as `ls` shows them.
        names: Vec<String>,
        /// All pools that no engine uses.
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Shared-memory directory.
        #[arg(long, default_value = "/dev/shm")]
        pool_dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Lists stores: name, size, who uses them.
    Ls {
        /// The directory given as `nvme_dir`.
        dir: PathBuf,
        /// JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Says what lies in stores: extents used, free and damaged, and their ages.
    Stat {
        /// The directory given as `nvme_dir`.
        dir: PathBuf,
        /// Names as `ls` shows them; all without any.
        names: Vec<String>,
        /// JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Reads and checks every extent of stores that no engine uses. Exit code 1 when something is
    /// damaged.
    Verify {
        /// The directory given as `nvme_dir`.
        dir: PathBuf,
        /// Names as `ls` shows them; all without any.
        names: Vec<String>,
        /// Drops damaged extents.
        #[arg(long)]
        repair: bool,
        /// JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Removes stores that no engine uses.
    Drop {
        /// The directory given as `nvme_dir`.
        dir: PathBuf,
        /// Names as `ls` shows them; all that no engine uses without any.
        names: Vec<String>,
        /// Does not ask. Needed where there is no terminal.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
enum IndexCommand {
    /// Follows engines' events and answers over HTTP who holds how much of a prompt.
    Serve(index::Options),
}

/// Runs the command with these arguments, without the program's name. Returns the exit code: 0
/// done, 1 refused or failed, 2 wrong usage.
pub fn run(args: Vec<String>) -> i32 {
    let command = match CommandLine::try_parse_from(std::iter::once("kvcellar".to_owned()).chain(args)) {
        Ok(command) => command,
        Err(error) => {
            // Printing help to a closed pipe is nobody's loss.
            let _printed = error.print();
            return error.exit_code();
        }
    };
    logging::to_stderr(command.log_format);
    match command.part {
        Topic::Pool(PoolCommand::Ls { pool_dir, json }) => pool::list(&pool_dir, json),
        Topic::Pool(PoolCommand::Rm { names, all, pool_dir }) => pool::remove(&pool_dir, &names, all),
        Topic::Store(StoreCommand::Ls { dir, json }) => store::list(&dir, json),
        Topic::Store(StoreCommand::Stat { dir, names, json }) => store::stat(&dir, &names, json),
        Topic::Store(StoreCommand::Verify { dir, names, repair, json }) => store::verify(&dir, &names, repair, json),
        Topic::Store(StoreCommand::Drop { dir, names, yes }) => store::remove(&dir, &names, yes),
        Topic::Index(IndexCommand::Serve(options)) => index::serve(&options),
        Topic::Route(options) => route::serve(&options),
        Topic::Top(options) => top::run(&options),
        Topic::Events(command) => events::run(&command),
        Topic::Doctor(options) => doctor::run(&options),
        Topic::Forget(options) => forget::run(&options),
        Topic::Warm(options) => warm::run(&options),
        Topic::Simulate(options) => kvcellar_simulate::run(&options).map_or_else(|error| refused(&error), |()| 0),
        Topic::Bench(command) => kvcellar_bench::run(command).map_or_else(|error| refused(&error), |()| 0),
    }
}

/// Says why a command did not do its work. The exit code.
fn refused(error: &dyn std::fmt::Display) -> i32 {
    eprintln!("kvcellar: {error}");
    1
}
