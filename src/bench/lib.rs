//! What the engine, the index and the router give on this machine, each beside a limit or a rival
//! measured in the same run: `kvcellar bench`.
//!
//! Every module is one benchmark: `Options` for the command line, `measure`, and `run`, which
//! prints. [`report`] is their common shape: medians with their spread, and goals.

pub mod all;
pub mod compression;
#[cfg(feature = "cuda")]
pub mod dma;
pub mod fleet;
pub mod index;
pub mod kinds;
pub mod lookup;
pub mod nvme;
pub mod policy;
pub mod report;
pub mod route;

use clap::Subcommand;

use kvcellar_block::error::Result;

/// One benchmark with its sizes.
#[derive(Debug, Subcommand)]
pub enum Benchmark {
    /// All that need neither a GPU nor a model, and how far each goal is reached.
    All(all::AllBench),
    /// Lookup and allocation in the block table, beside a bare hash map.
    Lookup(lookup::LookupBench),
    /// Blocks to disk and back through the whole nvme tier, beside a bare ring.
    Nvme(nvme::NvmeBench),
    /// Copies between a GPU's memory and the host's, beside one copy in one piece.
    #[cfg(feature = "cuda")]
    Dma(dma::DmaBench),
    /// What each eviction policy takes for a decision, and its memory.
    Policy(policy::PolicyBench),
    /// Events into the index and questions to it, beside a naive one.
    Index(index::IndexBench),
    /// What keeping and finding blocks costs for a hybrid model, beside a plain one.
    Kinds(kinds::KindsBench),
    /// Ways of routing side by side, over a simulated fleet.
    Fleet(fleet::FleetBench),
    /// Decisions, and the router's front ends beside the same with a fixed target.
    Route(route::RouteBench),
    /// Whether lossless compression would pay for the blocks in a store.
    Compression(compression::CompressionBench),
}

/// Runs a benchmark and prints what it found.
///
/// # Errors
/// Those of the benchmark.
pub fn run(command: Benchmark) -> Result<()> {
    match command {
        Benchmark::All(options) => all::run(&options),
        Benchmark::Lookup(options) => lookup::run(&options),
        Benchmark::Nvme(options) => nvme::run(&options),
        #[cfg(feature = "cuda")]
        Benchmark::Dma(options) => dma::run(&options),
        Benchmark::Policy(options) => policy::run(&options),
        Benchmark::Index(options) => index::run(&options),
        Benchmark::Kinds(options) => kinds::run(&options),
        Benchmark::Fleet(options) => fleet::run(&options),
        Benchmark::Route(options) => route::run(&options),
        Benchmark::Compression(options) => compression::run(&options),
    }
}
