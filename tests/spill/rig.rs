//! A played vLLM around a real engine.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvcellar_block::Tier;
use kvcellar_block::geometry::RankBytes;
use kvcellar_block::{BlockHash, GroupKind, GroupSpec, Grouping, SaltTag, SlotGeometry};
use kvcellar_engine::config::nvme::StagingChoice;
use kvcellar_engine::config::{Config, Controls};
use kvcellar_engine::event_log::Run;
use kvcellar_engine::gpu::Copier;
use kvcellar_engine::gpu::host::HostCopier;
use kvcellar_engine::gpu::sides::Sides;
use kvcellar_engine::gpu::views::{GroupRuns, LayerView};
use kvcellar_engine::gpu::worker::CopyWorker;
use kvcellar_engine::limits;
use kvcellar_engine::metrics::{Counters, Gauges};
use kvcellar_engine::nvme::disk::Disk;
use kvcellar_engine::nvme::staging::HugeStaging;
use kvcellar_engine::nvme::store::{Store, Wish as StoreWish};
use kvcellar_engine::pool::open::{self, Wish};
use kvcellar_engine::tier::disk_tier::{DiskParts, DiskSettings};
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::mover::{self, Mover, ToMover};
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use kvcellar_engine::tier::opening::{self, DiskReport, Identity};
use kvcellar_engine::tier::{Arrival, ForgetReport, TierEngine};

use kvcellar_testkit::faulty_disk::FaultyDisk;

pub(crate) const BLOCK_TOKENS: u32 = 16;
pub(crate) const BLOCK_BYTES: usize = 20_000;
/// Where loaded blocks go in vLLM's cache.
const FETCHED: usize = 100;
const KV_BLOCKS: usize = 200;
const PATIENCE: Duration = Duration::from_secs(30);

/// All tests run as `spill` and as `spill_staged`.
const STAGING: &str = if env!("CARGO_CRATE_NAME").len() == "spill_staged".len() { "on" } else { "off" };

/// Which blocks both tiers keep: another policy than the usual one in the program of that name.
const POLICY: &str = if env!("CARGO_CRATE_NAME").len() == "spill_adaptive".len() { "adaptive" } else { "lru" };

/// Chain `chain`'s block `index`.
pub(crate) fn hash(chain: u32, index: u32) -> BlockHash {
    let mut bytes = [0_u8; 32];
    let mixed = u64::from(chain) << 32 | u64::from(index);
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mixed.wrapping_add(at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    BlockHash::new(&bytes).expect("32 bytes")
}

/// The bytes that belong to a block, whoever asks.
pub(crate) fn content(hash: &BlockHash) -> Vec<u8> {
    let mut state = hash.low_u64() | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..BLOCK_BYTES.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(BLOCK_BYTES).collect()
}

fn grouping() -> Grouping {
    let group =
        GroupSpec { kind: GroupKind::Full, kind_name: "full".to_owned(), block_tokens: BLOCK_TOKENS, eagle: false };
    Grouping { groups: vec![group], hash_tokens: BLOCK_TOKENS, hit_tokens: BLOCK_TOKENS }
}

fn geometry() -> SlotGeometry {
    let rank = RankBytes { block_bytes: vec![BLOCK_BYTES as u64], replica_of: vec![None] };
    SlotGeometry::lay_out(&grouping(), &[rank]).expect("it fits")
}

/// Directories of one test: a pool in shared memory and a store on a real disk.
pub(crate) struct Places {
    pub(crate) pool: tempfile::TempDir,
    pub(crate) disk: tempfile::TempDir,
}

impl Places {
    pub(crate) fn new() -> Self {
        let disk =
            tempfile::Builder::new().prefix("spill-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        Self { pool: tempfile::tempdir_in("/dev/shm").expect("a directory"), disk }
    }

    /// The pool's memory is gone, as after the machine's restart.
    pub(crate) fn forget_pool(&mut self) {
        self.pool = tempfile::tempdir_in("/dev/shm").expect("a directory");
    }

    /// How often byte strings lie in the pool and in the segments. They begin at multiples of 8
    /// bytes, as names in descriptors and payloads do.
    pub(crate) fn count(&self, needles: &[Vec<u8>]) -> (usize, usize) {
        let head = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let by_head: HashMap<u64, &Vec<u8>> = needles.iter().map(|needle| (head(needle), needle)).collect();
        let is_one = |bytes: &[u8]| by_head.get(&head(bytes)).is_some_and(|needle| bytes.starts_with(needle));
        let in_file = |path: PathBuf| {
            let bytes = std::fs::read(path).expect("a file");
            (0..bytes.len() / 8).filter(|word| is_one(&bytes[word * 8..])).count()
        };
        let pools = files_below(self.pool.path()).into_iter();
        (pools.map(in_file).sum(), self.segments().into_iter().map(in_file).sum())
    }

    /// All segment files.
    pub(crate) fn segments(&self) -> Vec<PathBuf> {
        let mut found = files_below(self.disk.path());
        found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment-")));
        found
    }
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(dir) = rest.pop() {
        for entry in std::fs::read_dir(&dir).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() { rest.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

fn engine_with_pool(
    pool_dir: &Path,
    disk_dir: &Path,
    slots: u64,
    nvme_size: &str,
    more: &str,
) -> kvcellar_block::error::Result<(Arc<Mutex<TierEngine>>, Config)> {
    let geometry = geometry();
    let json = format!(
        r#"{{"nvme_dir": "{}", "nvme_size": "{nvme_size}", "nvme_reserve": "1MiB", "nvme_staging": "{STAGING}", "policy": "{POLICY}"{more}}}"#,
        disk_dir.display()
    );
    let config = Config::parse(&json)?;
    let bytes = limits::HEADER_BYTES + limits::SLOT_ALIGN + slots * (geometry.slot_bytes + 64);
    let wish = Wish {
        pool_dir,
        namespace: [9; 16],
        facts: "{}",
        bytes,
        total: bytes,
        explicit: true,
        adopt: true,
        geometry: &geometry,
        near: &[],
    };
    let opened = open::open(&wish, &mut |_, _| ())?;
    let engine = Arc::new(Mutex::new(TierEngine::new(&config, grouping())?));
    lock(&engine).open_pool(opened.pool, opened.adopted);
    Ok((engine, config))
}

pub(crate) struct Rig {
    pub(crate) engine: Arc<Mutex<TierEngine>>,
    report: Option<DiskReport>,
    pub(crate) events: Vec<Run>,
    mover: Option<Mover>,
    worker: CopyWorker,
    cache: Vec<u8>,
    requests: u32,
    /// Whose each chain is; nobody's without an entry.
    salts: HashMap<u32, SaltTag>,
    /// The tenant of the requests from now on.
    pub(crate) tenant: Option<&'static str>,
}

impl Rig {
    /// An engine with `slots` slots and these further settings.
    pub(crate) fn open(places: &Places, slots: u64, nvme_size: &str, more: &str) -> Self {
        Self::try_open(places.pool.path(), places.disk.path(), slots, nvme_size, more).expect("an engine")
    }

    pub(crate) fn try_open(
        pool_dir: &Path,
        disk_dir: &Path,
        slots: u64,
        nvme_size: &str,
        more: &str,
    ) -> kvcellar_block::error::Result<Self> {
        let (engine, config) = engine_with_pool(pool_dir, disk_dir, slots, nvme_size, more)?;
        let identity = Identity { namespace: [9; 16], facts: "{}", stable: true };
        let (mover, report) =
            opening::open_disk(&engine, &config, identity, 1, &mut |_, _| ())?.expect("a disk is configured");
        Self::assemble(engine, mover, Some(report))
    }

    /// An engine that is asked to forget a salt before its disk is there, with the request's name.
    pub(crate) fn open_asked(
        places: &Places,
        slots: u64,
        nvme_size: &str,
        more: &str,
        salt: SaltTag,
    ) -> (Self, String) {
        let (engine, config) =
            engine_with_pool(places.pool.path(), places.disk.path(), slots, nvme_size, more).expect("an engine");
        let id = "request-0".to_owned();
        {
            let mut engine = lock(&engine);
            let controls = Controls { forget: true, ..Controls::default() };
            engine.add_request(&id, Arrival { controls, salt, ..Arrival::default() });
            assert_eq!((engine.lookup(&id, 5, 0), engine.forgotten(&id)), (Hit::AskAgain, None));
        }
        let identity = Identity { namespace: [9; 16], facts: "{}", stable: true };
        let opened = opening::open_disk(&engine, &config, identity, 1, &mut |_, _| ()).expect("opened");
        let (mover, report) = opened.expect("a disk is configured");
        (Self::assemble(engine, mover, Some(report)).expect("a worker"), id)
    }

    /// An engine whose disk is in memory and fails as it is told.
    pub(crate) fn with_faults(places: &Places, slots: u64, seed: u64, more: &str) -> (Self, Arc<FaultyDisk>) {
        let (engine, config) =
            engine_with_pool(places.pool.path(), places.disk.path(), slots, "8MiB", more).expect("an engine");
        let pool = lock(&engine).pool().cloned().expect("a pool");
        let wish = StoreWish {
            dir: places.disk.path(),
            namespace: [9; 16],
            facts: "{}",
            capacity_bytes: config.nvme.bytes,
            total_bytes: u64::MAX,
            reserve_bytes: 1 << 20,
            geometry: pool.geometry(),
            reuse: false,
            segment_bytes_max: None,
        };
        let mut store = Store::open(&wish).expect("a store").store;
        let (jobs, inbox) = crossbeam_channel::unbounded();
        let disk = Arc::new(FaultyDisk::automatic(Arc::new(ToMover::new(jobs.clone(), Arc::clone(&pool))), seed));
        let segment = store.grow().expect("room").expect("a segment");
        disk.add_segment(segment).expect("a segment");
        let settings = DiskSettings {
            write_through: config.nvme.write_through,
            clean_percent: config.nvme.clean_percent,
            load_policy: config.nvme.load_policy,
            admission: config.nvme.admission,
            retention_s: None,
            write_budget: config.nvme.write_budget,
            policy: config.policy,
            tenants: config.tenants.clone(),
        };
        let device = Arc::clone(&disk) as Arc<dyn Disk>;
        let staging = (config.nvme.staging == StagingChoice::On)
            .then(|| HugeStaging::new(pool.geometry().slot_bytes).expect("memory"));
        let staging_bytes = staging.as_ref().map_or(0, HugeStaging::bytes);
        let parts = DiskParts { store, disk: device, jobs, found: &[], next_sequence: 1, staging_bytes };
        lock(&engine).open_disk(parts, settings);
        let mover = Mover::start(&engine, inbox, staging).expect("a mover");
        (Self::assemble(engine, Some(mover), None).expect("a worker"), disk)
    }

    fn assemble(
        engine: Arc<Mutex<TierEngine>>,
        mover: Option<Mover>,
        report: Option<DiskReport>,
    ) -> kvcellar_block::error::Result<Self> {
        let mut cache = vec![0_u8; KV_BLOCKS * BLOCK_BYTES];
        let view = LayerView {
            address: cache.as_mut_ptr() as u64,
            stride_bytes: BLOCK_BYTES as u64,
            page_bytes: BLOCK_BYTES as u64,
            pages_per_block: 1,
            pages: KV_BLOCKS as u64,
        };
        let groups = Arc::new(vec![GroupRuns::resolve(0, &[view])?]);
        let mut worker = CopyWorker::new(
            0,
            false,
            Box::new(move |pool, answers, guard| {
                // SAFETY: the cache's memory does not move and outlives the worker, which
                // `Rig::drop` releases first.
                let side = unsafe { Sides::new(pool, Arc::clone(&groups), 0, false, guard) };
                Ok(Box::new(HostCopier::start(side, &answers, 1)?) as Box<dyn Copier>)
            }),
        );
        let ticket = lock(&engine).pool().expect("a pool").ticket();
        worker.attach(&ticket)?;
        Ok(Self {
            engine,
            report,
            events: Vec::new(),
            mover,
            worker,
            cache,
            requests: 0,
            salts: HashMap::new(),
            tenant: None,
        })
    }

    /// What its start told.
    pub(crate) fn report(&self) -> &DiskReport {
        self.report.as_ref().expect("a real disk")
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, TierEngine> {
        lock(&self.engine)
    }

    pub(crate) fn counters(&self) -> Counters {
        self.lock().counters()
    }

    pub(crate) fn gauges(&self) -> Gauges {
        self.lock().gauges()
    }

    fn request(&mut self, chain: u32, blocks: u32) -> String {
        self.requests += 1;
        let id = format!("request-{}", self.requests);
        let hashes: Vec<BlockHash> = (0..blocks).map(|index| hash(chain, index)).collect();
        let mut engine = self.lock();
        let salt = self.salts.get(&chain).copied().unwrap_or(SaltTag::NONE);
        let controls = Controls { tenant: self.tenant.map(Into::into), ..Controls::default() };
        engine.add_request(&id, Arrival { controls, salt, ..Arrival::default() });
        engine.add_hashes(&id, &hashes);
        drop(engine);
        id
    }

    pub(crate) fn step(&mut self) {
        let (plan, events) = {
            let mut engine = self.lock();
            engine.poll();
            (engine.take_plan(), engine.take_events())
        };
        self.events.extend(events);
        self.worker.begin_step(&plan).expect("a plan");
        self.worker.start_loads();
        self.worker.finish_step();
    }

    /// Computes a chain's first blocks, as a prefill would, and offloads them.
    pub(crate) fn compute(&mut self, chain: u32, blocks: u32) {
        let id = self.request(chain, blocks);
        for index in 0..blocks {
            let at = (1 + index as usize) * BLOCK_BYTES;
            self.cache[at..at + BLOCK_BYTES].copy_from_slice(&content(&hash(chain, index)));
        }
        let tokens = (0..blocks * BLOCK_TOKENS).collect();
        let group = GroupOffer { first: 0, blocks: (1..=blocks).collect(), extra: Vec::new() };
        let offer = Offer { request: &id, tokens_from: 0, tokens, groups: vec![group] };
        {
            let mut engine = self.lock();
            engine.admit(&id, 0, &[]);
            engine.offer(&offer, Start::AfterStep);
            engine.finish(&id, blocks * BLOCK_TOKENS, blocks * BLOCK_TOKENS);
        }
        self.step();
        self.settle();
    }

    /// Asks for a chain's first blocks and loads what the engine offers. Returns the number of
    /// blocks that came back, `Err` when the load failed.
    ///
    /// Every byte that comes back is compared with what belongs there.
    pub(crate) fn fetch(&mut self, chain: u32, blocks: u32) -> std::result::Result<u32, u32> {
        let id = self.request(chain, blocks);
        let outcome = self.fetch_as(&id, chain, blocks);
        self.lock().finish(&id, blocks * BLOCK_TOKENS, blocks * BLOCK_TOKENS);
        outcome
    }

    /// As [`Self::fetch`], for a request that asked before.
    pub(crate) fn fetch_as(&mut self, id: &str, chain: u32, blocks: u32) -> std::result::Result<u32, u32> {
        let count = self.begin_fetch(id, blocks);
        if count == 0 {
            return Ok(0);
        }
        if self.wait_for_load(id) {
            return Err(count);
        }
        for index in 0..count {
            let at = (FETCHED + index as usize) * BLOCK_BYTES;
            assert!(self.cache[at..at + BLOCK_BYTES] == content(&hash(chain, index)), "block {index} of chain {chain}");
        }
        Ok(count)
    }

    /// Asks for a request's first blocks and begins to load what the engine offers. Returns how
    /// many blocks those are.
    pub(crate) fn begin_fetch(&mut self, id: &str, blocks: u32) -> u32 {
        // One token more than the blocks hold, so that all of them may be hit.
        let hit = self.lock().lookup(id, blocks * BLOCK_TOKENS + 1, 0);
        let Hit::Tokens(tokens) = hit else { panic!("nobody else loads") };
        let count = tokens / BLOCK_TOKENS;
        self.cache[FETCHED * BLOCK_BYTES..].fill(0xee);
        let ids: Vec<u32> = (0..count).map(|index| FETCHED as u32 + index).collect();
        self.lock().admit(id, tokens, &[ids]);
        if count > 0 {
            self.step();
        }
        count
    }

    /// From now on a chain is of requests with this salt.
    pub(crate) fn salt(&mut self, chain: u32, salt: SaltTag) {
        self.salts.insert(chain, salt);
    }

    /// Asks, as a request with this salt would, for everything of it to be forgotten. Returns the
    /// request's name.
    pub(crate) fn begin_to_forget(&mut self, salt: SaltTag) -> String {
        self.requests += 1;
        let id = format!("request-{}", self.requests);
        let mut engine = self.lock();
        let controls = Controls { forget: true, ..Controls::default() };
        engine.add_request(&id, Arrival { controls, salt, ..Arrival::default() });
        engine.lookup(&id, 5, 0);
        drop(engine);
        id
    }

    /// Whether all of it is forgotten.
    pub(crate) fn has_forgotten(&mut self, id: &str) -> Option<ForgetReport> {
        let mut engine = self.lock();
        let answer = engine.lookup(id, 5, 0);
        let report = engine.forgotten(id);
        assert_eq!(report.is_some(), matches!(answer, Hit::Tokens(0)), "it waits until all is done");
        report
    }

    /// Forgets a salt, and waits until that is done.
    pub(crate) fn forget(&mut self, salt: SaltTag) -> ForgetReport {
        let id = self.begin_to_forget(salt);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(report) = self.has_forgotten(&id) {
                self.lock().finish(&id, 5, 5);
                return report;
            }
            assert!(Instant::now() < end, "it is never forgotten: {:?}", self.gauges());
            sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn ask(&mut self, chain: u32, blocks: u32) -> String {
        self.request(chain, blocks)
    }

    /// Waits for the end of a load. Returns whether it failed.
    pub(crate) fn wait_for_load(&mut self, id: &str) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            let results = self.worker.take_results();
            if !results.finished.is_empty() {
                assert_eq!(results.finished, [id.to_owned()]);
                let failed = !results.failed.is_empty();
                self.lock().load_ended(id, failed);
                return failed;
            }
            assert!(Instant::now() < end, "the load of {id} never ended: {:?}", self.gauges());
            sleep(Duration::from_millis(1));
        }
    }

    /// Waits until nothing is copied, written or read.
    pub(crate) fn settle(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.lock().poll();
            let gauges = self.gauges();
            if gauges.filling_slots + gauges.fences == 0 && self.lock().disk_is_idle() {
                break;
            }
            assert!(Instant::now() < end, "it never settled: {gauges:?}");
            sleep(Duration::from_millis(1));
        }
        let events = self.lock().take_events();
        self.events.extend(events);
        let gauges = self.gauges();
        assert_eq!((gauges.pins, gauges.leases), (0, 0), "nothing is held");
    }

    /// Hashes that the events so far say a tier holds.
    pub(crate) fn announced(&self, wanted: Tier) -> std::collections::BTreeSet<u64> {
        let mut held = std::collections::BTreeSet::new();
        for run in &self.events {
            match run {
                Run::Stored { tier, hashes, tokens, .. } if *tier == wanted => {
                    assert_eq!(tokens.len(), hashes.len() * BLOCK_TOKENS as usize, "events are self-describing");
                    held.extend(hashes.iter().map(BlockHash::low_u64));
                }
                Run::Removed { tier, hashes, .. } if *tier == wanted => {
                    held.retain(|held| !hashes.iter().any(|hash| hash.low_u64() == *held));
                }
                _ => {}
            }
        }
        held
    }

    /// Ends as a served engine does: dirty blocks are written, a snapshot is left.
    pub(crate) fn stop(self) {
        mover::shut(&self.engine);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // The worker's threads use the cache.
        self.worker.release();
        drop(self.mover.take());
    }
}

pub(crate) fn lock(engine: &Mutex<TierEngine>) -> MutexGuard<'_, TierEngine> {
    engine.lock().expect("no panic in the engine")
}
