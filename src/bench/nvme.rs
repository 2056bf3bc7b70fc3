//! `kvcellar bench nvme`: what the nvme tier makes of a disk, beside what the disk gives.
//!
//! Measured: blocks through the whole tier (directory, seals, checksums, slots of a real pool,
//! mover, ring), directly and through staging. In turn with that: a bare ring that does the same
//! transfers and nothing else, in a pool's memory and in huge pages; the tier over threads; and,
//! from Python, vLLM's own tier of files. In turn, so that a noisy neighbour hits all alike;
//! whoever begins changes with every repetition. Not measured: copies to and from a KV cache.
//! Leaves nothing behind.

pub mod bare;
pub mod meter;
pub mod reopen;
mod rival;
pub mod tier;

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use self::bare::{Bare, BareMemory};
use self::meter::{BARE, BARE_HUGE, CHECKSUM, DiskWay, PASS, RIVAL, Reading, Readings, STAGED, THREADS, TIER, metered};
use self::tier::WholeTier;
use super::report::{Goal, Measured, report};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::geometry::RankBytes;
use kvcellar_block::size::show;
use kvcellar_block::{GroupKind, GroupSpec, Grouping, SlotGeometry};
use kvcellar_engine::config::Config;
use kvcellar_engine::config::nvme::DiskEngine;
use kvcellar_engine::config::size;
use kvcellar_engine::limits::{self, PAGE_TRIAL_BYTES};
use kvcellar_engine::nvme::disk::Description;
use kvcellar_engine::nvme::page_trial::{self, PageTrial};
use kvcellar_engine::nvme::space;
use kvcellar_engine::pool::open as pools;

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct NvmeBench {
    /// Directory on the disk.
    #[arg(long)]
    pub dir: PathBuf,
    /// Sizes of a block with its descriptor, multiples of 4 KiB.
    #[arg(long, value_delimiter = ',', default_value = "64KiB,1MiB,4MiB", value_parser = size_of)]
    pub sizes: Vec<u64>,
    /// Bytes that each contender moves in a repetition.
    #[arg(long, default_value = "256MiB", value_parser = size_of)]
    pub bytes: u64,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 7)]
    pub repetitions: u32,
    /// Measures instead how a store with this many blocks is opened again.
    #[arg(long)]
    pub reopen: Option<u32>,
    /// Shared-memory directory for the pools.
    #[arg(long, default_value = "/dev/shm")]
    pub pool_dir: PathBuf,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Somebody else takes part: each of his turns is a line of JSON on standard output, which he
    /// answers with one on standard input. The report is the last line.
    #[arg(long, hide = true)]
    pub rival_stdio: bool,
}

fn size_of(text: &str) -> std::result::Result<u64, String> {
    size::parse("size", &Value::from(text)).map_err(|error| error.to_string())
}

/// What somebody else is asked to do in his turn: to move as many bytes in blocks of this size.
#[derive(Debug, Clone, Copy)]
pub struct RivalTurn {
    /// Bytes of a block.
    pub size: u64,
    /// How many.
    pub blocks: u32,
    /// Which way: what is read is what was written in the turn before.
    pub way: DiskWay,
    /// The number of the chain of blocks.
    pub chain: u32,
}

/// Somebody else who takes part.
pub type Rival<'a> = dyn FnMut(RivalTurn) -> Result<Reading> + Send + 'a;

/// A report's parts.
#[derive(Debug)]
pub struct NvmeOutcome {
    /// What was measured.
    pub results: Vec<Measured>,
    /// What should have been reached.
    pub goals: Vec<Goal>,
    /// What the numbers depend on beside the machine.
    pub disk: Value,
}

impl NvmeOutcome {
    /// As JSON.
    pub fn report(&self) -> Value {
        let mut whole = report(&self.results, &self.goals);
        whole["disk"] = self.disk.clone();
        whole
    }
}

/// A directory that is removed with everything in it.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("kvcellar-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .and_then(|()| path.canonicalize())
            .map(Self)
            .map_err(|error| Error::io("making", path, error, "Name a directory that you may write to"))
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("kvcellar: {} is left over: {error}", self.0.display());
        }
    }
}

const TOKENS: u32 = 16;

fn grouping() -> Grouping {
    let group = GroupSpec { kind: GroupKind::Full, kind_name: "full".to_owned(), block_tokens: TOKENS, eagle: false };
    Grouping { groups: vec![group], hash_tokens: TOKENS, hit_tokens: TOKENS }
}

/// The geometry whose slots have `size` bytes, descriptor included.
fn geometry(size: u64) -> Result<SlotGeometry> {
    let lay_out = |payload: u64| {
        SlotGeometry::lay_out(&grouping(), &[RankBytes { block_bytes: vec![payload], replica_of: vec![None] }])
    };
    let descriptor = lay_out(limits::SLOT_ALIGN)?.descriptor_bytes;
    if !size.is_multiple_of(limits::SLOT_ALIGN) || size <= descriptor {
        let remedy = format!("Write multiples of 4 KiB from {} on", show(descriptor + limits::SLOT_ALIGN));
        return Err(Error::config("--sizes", show(size), remedy));
    }
    lay_out(size - descriptor)
}

/// Slots of a pool that holds one chain and not a block more, beside the window that the tier sets
/// aside: so a new chain evicts the whole one before it.
fn slots_for(blocks: u32) -> u32 {
    let window = |slots: u32| {
        (slots / limits::WINDOW_POOL_SHARE)
            .clamp(limits::WINDOW_SLOTS_MIN, limits::WINDOW_SLOTS_MAX)
            .min(slots / 2)
            .max(1)
    };
    (blocks..u32::MAX).find(|slots| slots - window(*slots) >= blocks).unwrap_or(u32::MAX)
}

/// Everybody who takes part at one size.
struct Field {
    size: u64,
    blocks: u32,
    tier: WholeTier,
    staged: WholeTier,
    threads: WholeTier,
    bare: Bare,
}

impl Field {
    fn open(options: &NvmeBench, size: u64, dir: &Path, pool_dir: &Path) -> Result<Self> {
        let geometry = geometry(size)?;
        let blocks = (options.bytes / size).clamp(1, u64::from(u32::MAX / TOKENS) - 1) as u32;
        // The chain that is written, the one that is read, and the colder one that was read before
        // and is given up; and some more.
        let capacity = size * u64::from(blocks) * 13 / 4 + 8 * size + (8 << 20);
        let free = space::free_bytes(dir)?;
        if free / (u64::from(tier::TOGETHER) + 1) < capacity {
            let problem = format!("four stores of {} are needed, {} are free", show(capacity), show(free));
            return Err(Error::config("--bytes", problem, "Write less, or name another directory"));
        }
        let slots = u64::from(slots_for(blocks));
        let bytes = limits::HEADER_BYTES + limits::SLOT_ALIGN + slots * (geometry.slot_bytes + 64);
        let pool = |namespace: u8| {
            let wish = pools::Wish {
                near: &[],
                pool_dir,
                namespace: [namespace; 16],
                facts: "{}",
                bytes,
                // One pool for each way that takes its turn.
                total: bytes.saturating_mul(8),
                explicit: true,
                adopt: false,
                geometry: &geometry,
            };
            pools::open(&wish, &mut |_, _| ()).map(|opened| opened.pool)
        };
        let tier = |engine: &str, staging: &str, namespace: u8| {
            let settings = json!({
                "nvme_dir": dir, "nvme_size": capacity * u64::from(tier::TOGETHER), "nvme_reserve": "1MiB", "nvme_engine": engine, "nvme_staging": staging,
                "write_through": true, "events": false,
            });
            WholeTier::open(&Config::parse(&settings.to_string())?, pool(namespace)?, grouping(), blocks, namespace)
        };
        Ok(Self {
            size,
            blocks,
            tier: tier("auto", "off", 1)?,
            staged: tier("auto", "on", 4)?,
            threads: tier("threads", "off", 2)?,
            bare: Bare::open(dir, pool(3)?, capacity, &geometry)?,
        })
    }

    fn bytes(&self) -> u64 {
        self.size * u64::from(self.blocks)
    }

    /// Writes every extent once, so that nobody is timed while files grow. Returns the number of
    /// the next chain.
    fn warm_up(&self) -> Result<u32> {
        let extents = self.bare.extents();
        let chains = extents.div_ceil(self.blocks) + 1;
        for chain in 0..chains {
            self.tier.write(chain)?;
            self.staged.write(chain)?;
            self.threads.write(chain)?;
            self.bare.run(BareMemory::Pool, DiskWay::Write, chain * self.blocks % extents, self.blocks)?;
        }
        Ok(chains)
    }

    fn take_turn(&self, who: &str, way: DiskWay, chain: u32) -> Result<()> {
        match (who, way) {
            (TIER, DiskWay::Write) => self.tier.write(chain),
            (TIER, DiskWay::Read) => self.tier.read(chain),
            (STAGED, DiskWay::Write) => self.staged.write(chain),
            (STAGED, DiskWay::Read) => self.staged.read(chain),
            (THREADS, DiskWay::Write) => self.threads.write(chain),
            (THREADS, DiskWay::Read) => self.threads.read(chain),
            (CHECKSUM, _) => {
                std::hint::black_box(self.bare.checksums(self.blocks));
                Ok(())
            }
            (PASS, _) => {
                std::hint::black_box(self.bare.passes(self.blocks));
                Ok(())
            }
            _ => {
                let memory = if who == BARE_HUGE { BareMemory::Huge } else { BareMemory::Pool };
                self.bare.run(memory, way, chain % 2 * self.blocks % self.bare.extents(), self.blocks)
            }
        }
    }

    /// One repetition: everybody writes chain `chain`, then everybody reads the one before it.
    fn repeat(&self, chain: u32, rival: &mut Option<&mut Rival<'_>>, table: &mut Readings) -> Result<()> {
        let mut order = vec![TIER, BARE, STAGED, BARE_HUGE, THREADS, CHECKSUM, PASS];
        if rival.is_some() {
            order.push(RIVAL);
        }
        let first = chain as usize % order.len();
        order.rotate_left(first);
        for (way, chain) in [(DiskWay::Write, chain), (DiskWay::Read, chain - 1)] {
            for who in &order {
                let reading = match rival {
                    Some(rival) if *who == RIVAL => {
                        rival(RivalTurn { size: self.size, blocks: self.blocks, way, chain })?
                    }
                    _ => metered(|| self.take_turn(who, way, chain))?.1,
                };
                table.put(who, way, self.size, self.bytes(), reading);
            }
        }
        Ok(())
    }
}

fn device(description: &Description) -> Value {
    json!({
        "engine": description.engine,
        "direct": description.direct,
        "registered": description.registered,
        "why": description.why,
    })
}

/// What the numbers depend on: never where the directory is.
pub(super) fn surroundings(dir: &Path, load_before: &str) -> Value {
    let magic = nix::sys::statfs::statfs(dir).map(|found| found.filesystem_type().0);
    let file_system = match magic {
        Ok(0xef53) => "ext4".to_owned(),
        Ok(0x5846_5342) => "xfs".to_owned(),
        Ok(0x9123_683e) => "btrfs".to_owned(),
        Ok(0x0102_1994) => "tmpfs".to_owned(),
        Ok(other) => format!("{other:#x}"),
        Err(errno) => errno.to_string(),
    };
    json!({ "file_system": file_system, "load_before": load_before, "load_after": load() })
}

/// The machine's load averages: what else ran beside the benchmark.
pub(super) fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

/// Runs the measurements. `rival`: somebody else who takes his turn, if there is one; his turn at
/// chain 0 of a size is not measured.
///
/// # Errors
/// Those of pools, stores and disks; [`Error::DataLost`] when something else would be measured than
/// is said.
pub fn measure(options: &NvmeBench, mut rival: Option<&mut Rival<'_>>) -> Result<NvmeOutcome> {
    if options.repetitions == 0 || options.sizes.is_empty() {
        return Err(Error::config("--repetitions, --sizes", "there is nothing to do", "Write at least one"));
    }
    let (dir, pool_dir) = (ScratchDir::new(&options.dir)?, ScratchDir::new(&options.pool_dir)?);
    let load_before = load();
    let rounds = options.sizes.len() as u64 * (u64::from(options.repetitions) + 1);
    let bar = ProgressBar::new(rounds);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let mut table = Readings::default();
    let mut goals = Vec::new();
    let mut disk = json!({});
    let mut trials = serde_json::Map::new();
    for size in &options.sizes {
        bar.set_message(format!("warming up {}", show(*size)));
        let field = Field::open(options, *size, &dir.0, &pool_dir.0)?;
        // What an engine would do whose pool is large enough.
        let trial = page_trial::run(DiskEngine::Auto, &dir.0, 0, field.bare.part(PAGE_TRIAL_BYTES));
        trials.insert(
            show(*size),
            json!({
                "gain": if let PageTrial::Gain(gain) = trial { Value::from(gain) } else { Value::Null },
                "staging_pays": trial.pays(),
            }),
        );
        let start = field.warm_up()?;
        if let Some(rival) = &mut rival {
            rival(RivalTurn { size: *size, blocks: field.blocks, way: DiskWay::Write, chain: start - 1 })?;
        }
        bar.inc(1);
        bar.set_message(format!("measuring {}", show(*size)));
        for repetition in 0..options.repetitions {
            field.repeat(start + repetition, &mut rival, &mut table)?;
            bar.inc(1);
        }
        goals.extend(table.goals(*size, if trial.pays() { STAGED } else { TIER }));
        disk = json!({
            "tier": device(field.tier.describe()),
            "bare": device(&field.bare.describe()),
            "tier_threads": device(field.threads.describe()),
        });
    }
    bar.finish_and_clear();
    disk["page_trial"] = Value::Object(trials);
    disk["bytes"] = options.bytes.into();
    disk["repetitions"] = options.repetitions.into();
    disk["surroundings"] = surroundings(&dir.0, &load_before);
    Ok(NvmeOutcome { results: table.results(), goals, disk })
}

/// Runs the benchmark and prints it.
///
/// # Errors
/// As [`measure`].
pub fn run(options: &NvmeBench) -> Result<()> {
    let outcome = match options.reopen {
        Some(blocks) => reopen::measure(options, blocks)?,
        None if options.rival_stdio => measure(options, Some(&mut rival::over_stdio))?,
        None => measure(options, None)?,
    };
    if options.rival_stdio {
        println!("{}", outcome.report());
    } else if options.json {
        println!("{:#}", outcome.report());
    } else {
        super::report::print(&outcome.results, &outcome.goals, 4);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn options(dir: &Path) -> NvmeBench {
        NvmeBench {
            dir: dir.to_owned(),
            sizes: vec![16 << 10, 256 << 10],
            bytes: 2 << 20,
            repetitions: 2,
            reopen: None,
            pool_dir: PathBuf::from("/dev/shm"),
            json: true,
            rival_stdio: false,
        }
    }

    fn target() -> tempfile::TempDir {
        // Beside the test's binary: on a real disk.
        let binary = std::env::current_exe().expect("a binary");
        tempfile::tempdir_in(binary.parent().expect("a directory")).expect("a directory")
    }

    #[test]
    fn a_tiny_run_measures_everybody_and_leaves_nothing() {
        let dir = target();
        let mut turns = Vec::new();
        let mut rival = |turn: RivalTurn| {
            turns.push((turn.size, turn.way, turn.chain));
            Ok(Reading { seconds: 1.0, cpu_s: 1.0 })
        };
        let outcome = measure(&options(dir.path()), Some(&mut rival)).expect("a measurement");
        assert!(outcome.results.iter().all(|result| result.n == 2 && result.value.is_finite()));
        // At each size and in each direction: six rates, eight CPU times, four goals.
        assert_eq!((outcome.results.len(), outcome.goals.len()), (2 * 2 * 14, 2 * 2 * 4));
        assert!(outcome.results.iter().filter(|result| result.unit == "GB/s").all(|result| result.value > 0.0));
        assert_eq!(turns.len(), 2 * (1 + 2 * 2));
        // What is read is what was written a turn before.
        let read = turns.iter().filter(|(_, way, _)| *way == DiskWay::Read);
        assert!(read.into_iter().all(|(size, _, chain)| turns.contains(&(*size, DiskWay::Write, *chain))));
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for size in [4096, 10_000] {
            assert!(geometry(size).is_err(), "{size}");
        }
        assert_eq!(geometry(65_536).expect("a geometry").slot_bytes, 65_536);
    }

    #[test]
    fn a_tiny_store_is_reopened_both_ways() {
        let dir = target();
        let outcome = reopen::measure(&options(dir.path()), 3_000).expect("a measurement");
        assert!(outcome.results.iter().all(|result| result.value > 0.0 && result.n == 2), "{:?}", outcome.results);
        assert_eq!(outcome.goals.len(), 2);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }
}
