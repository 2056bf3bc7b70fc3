//! The `kvcellar` command. `src/bin/kvcellar.rs` and `python -m kvcellar` both call [`run`].

pub mod bench_compression;
#[cfg(feature = "cuda")]
pub mod bench_dma;
#[cfg(feature = "serve")]
pub mod bench_fleet;
pub mod bench_index;
pub mod bench_lookup;
pub mod bench_nvme;
#[cfg(feature = "serve")]
pub mod bench_route;
#[cfg(feature = "serve")]
pub mod discovery;
pub mod doctor;
#[cfg(feature = "serve")]
pub mod events;
#[cfg(feature = "serve")]
pub mod index;
pub mod pool;
pub mod report;
#[cfg(feature = "serve")]
pub mod route;
pub mod store;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::logging;

/// KV-cache offload engine for vLLM.
#[derive(Debug, Parser)]
#[command(name = "kvcellar", version, about)]
struct Command {
    /// How log lines are written to standard error.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Shared host pools of this user: show them, remove leftovers.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Stores of this user on disk: show, check and remove them.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Says whether this machine, and a directory meant as `nvme_dir`, suit KV Cellar. Exit code 1
    /// when something does not work.
    Doctor(doctor::Options),
    /// An index of a fleet's KV blocks.
    #[cfg(feature = "serve")]
    #[command(subcommand)]
    Index(IndexCommand),
    /// Sends each request of a fleet to the engine that saves the most work.
    #[cfg(feature = "serve")]
    Route(Box<route::Options>),
    /// Events of engines: watch, record, play again, make up.
    #[cfg(feature = "serve")]
    #[command(subcommand)]
    Events(events::EventsCommand),
    /// What this machine gives.
    #[command(subcommand)]
    Bench(BenchCommand),
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

#[cfg(feature = "serve")]
#[derive(Debug, Subcommand)]
enum IndexCommand {
    /// Follows engines' events and answers over HTTP who holds how much of a prompt.
    Serve(index::Options),
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Lookup and allocation in the block table, beside a bare hash map.
    Lookup(bench_lookup::Options),
    /// Blocks to disk and back through the whole nvme tier, beside a bare ring.
    Nvme(bench_nvme::Options),
    /// Copies between a GPU's memory and the host's, beside one copy in one piece.
    #[cfg(feature = "cuda")]
    Dma(bench_dma::Options),
    /// Events into the index and questions to it, beside a naive one.
    Index(bench_index::Options),
    /// Ways of routing side by side, over a simulated fleet.
    #[cfg(feature = "serve")]
    Fleet(bench_fleet::Options),
    /// Decisions, and the router's front ends beside the same with a fixed target.
    #[cfg(feature = "serve")]
    Route(bench_route::Options),
    /// Whether lossless compression would pay for the blocks in a store.
    Compression(bench_compression::Options),
}

/// Runs the command with these arguments, without the program's name. Returns the exit code: 0
/// done, 1 refused or failed, 2 wrong usage.
pub fn run(args: Vec<String>) -> i32 {
    let command = match Command::try_parse_from(std::iter::once("kvcellar".to_owned()).chain(args)) {
        Ok(command) => command,
        Err(error) => {
            // Printing help to a closed pipe is nobody's loss.
            let _printed = error.print();
            return error.exit_code();
        }
    };
    logging::to_stderr(command.log_format);
    match command.part {
        Part::Pool(PoolCommand::Ls { pool_dir, json }) => pool::list(&pool_dir, json),
        Part::Pool(PoolCommand::Rm { names, all, pool_dir }) => pool::remove(&pool_dir, &names, all),
        Part::Store(StoreCommand::Ls { dir, json }) => store::list(&dir, json),
        Part::Store(StoreCommand::Stat { dir, names, json }) => store::stat(&dir, &names, json),
        Part::Store(StoreCommand::Verify { dir, names, repair, json }) => store::verify(&dir, &names, repair, json),
        Part::Store(StoreCommand::Drop { dir, names, yes }) => store::remove(&dir, &names, yes),
        #[cfg(feature = "serve")]
        Part::Index(IndexCommand::Serve(options)) => index::serve(&options),
        #[cfg(feature = "serve")]
        Part::Route(options) => route::serve(&options),
        #[cfg(feature = "serve")]
        Part::Events(command) => events::run(&command),
        Part::Doctor(options) => doctor::run(&options),
        Part::Bench(BenchCommand::Lookup(options)) => bench_lookup::run(&options),
        Part::Bench(BenchCommand::Nvme(options)) => bench_nvme::run(&options),
        #[cfg(feature = "cuda")]
        Part::Bench(BenchCommand::Dma(options)) => bench_dma::run(&options),
        Part::Bench(BenchCommand::Index(options)) => bench_index::run(&options),
        #[cfg(feature = "serve")]
        Part::Bench(BenchCommand::Fleet(options)) => bench_fleet::run(&options),
        #[cfg(feature = "serve")]
        Part::Bench(BenchCommand::Route(options)) => bench_route::run(&options),
        Part::Bench(BenchCommand::Compression(options)) => bench_compression::run(&options),
    }
}

/// A directory that is not there is a mistake, and not an empty one: nobody wants to hear that all
/// is well in it.
fn present(argument: &str, dir: &std::path::Path) -> crate::error::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let problem = format!("{} is no directory", dir.display());
    Err(crate::error::Error::config(argument, problem, "Name the directory that the engine was given"))
}

/// Says why a command did not do its work. The exit code.
fn refused(error: &dyn std::fmt::Display) -> i32 {
    eprintln!("kvcellar: {error}");
    1
}

/// Listens at the address that the option `name` gives, and says where.
#[cfg(feature = "serve")]
async fn listen(
    name: &'static str,
    address: std::net::SocketAddr,
    what: &str,
) -> crate::error::Result<tokio::net::TcpListener> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
        crate::error::Error::config(name, format!("{address}: {error}"), "Name a free address, e.g. 127.0.0.1:0")
    })?;
    if let Ok(address) = listener.local_addr() {
        log::info!("{what}{address}");
    }
    Ok(listener)
}

/// Runs a command that waits for a network.
#[cfg(feature = "serve")]
fn block_on<T>(work: impl Future<Output = crate::error::Result<T>>) -> crate::error::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| crate::error::Error::io("starting", "threads", error, "Allow this process more threads"))?;
    runtime.block_on(work)
}

/// Ends when the process is asked to stop: SIGINT or SIGTERM.
#[cfg(feature = "serve")]
async fn told_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // Without handlers the signals end the process by themselves.
        _ => std::future::pending().await,
    }
}
