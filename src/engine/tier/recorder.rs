//! A record of requests, for `kvcellar simulate`: hashes, lengths and times, never tokens or text.
//!
//! One line of JSON a request, in Mooncake's format with fields of ours beside it. A thread writes
//! them, so that no request waits for the disk. The file is bounded: when it has half of its bytes
//! it becomes `FILE.1`, in place of an older one, and a new one begins. Of several engines each has
//! a file of its own: the second `FILE-2`, and so on. A line that cannot be
//! written, or finds too many waiting, is left out and counted.

use std::collections::hash_map::RandomState;
use std::fs::{File, OpenOptions};
use std::hash::BuildHasher;
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::requests::{Finished, RequestState};
use crate::limits;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{BlockHash, SaltTag};

/// One request as it is written.
#[derive(Debug, Serialize)]
struct RecordedRequest {
    /// When it came, in ms from the record's beginning.
    timestamp: u64,
    /// Tokens of its prompt.
    input_length: u32,
    /// Tokens of its answer.
    output_length: u32,
    /// Its prompt's blocks. The last one, if it is partial, has a name of its own.
    hash_ids: Vec<u64>,
    /// Tokens of a block.
    block_tokens: u32,
    /// Tokens that vLLM found in its own cache.
    local_tokens: u32,
    /// Tokens that came from the dram tier.
    dram_tokens: u32,
    /// Tokens that came from disk.
    nvme_tokens: u32,
    /// Tells its tenant's requests from others' in this record, and nowhere else.
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
}

impl RecordedRequest {
    fn of(request: &RequestState, finished: Finished, block_tokens: u32, recorder: &Recorder) -> Self {
        let Recorder { began, tenant_key, .. } = *recorder;
        let whole = (finished.prompt / block_tokens) as usize;
        let mut hash_ids: Vec<u64> = request.hashes.iter().take(whole).map(BlockHash::low_u64).collect();
        if finished.prompt as usize > whole * block_tokens as usize {
            // Nobody else has this one.
            let last = hash_ids.last().copied().unwrap_or(0);
            hash_ids.push(last ^ u64::from(request.serial).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        Self {
            timestamp: request.arrived.saturating_duration_since(began).as_millis() as u64,
            input_length: finished.prompt,
            output_length: finished.total.saturating_sub(finished.prompt),
            hash_ids,
            block_tokens,
            local_tokens: request.first_hit.local,
            dram_tokens: request.first_hit.dram,
            nvme_tokens: request.first_hit.nvme,
            tenant: tenant_of(request).map(|name| format!("{:016x}", xxh3_64_with_seed(name, tenant_key))),
        }
    }
}

/// What tells a request's tenant from others; `None`: nothing.
fn tenant_of(request: &RequestState) -> Option<&[u8]> {
    let salted = (request.salt != SaltTag::NONE).then(|| bytemuck::bytes_of(&request.salt));
    request.controls.tenant.as_deref().map(str::as_bytes).or(salted)
}

/// Writes what is recorded.
#[derive(Debug)]
struct RecordFile {
    path: PathBuf,
    open: OpenRecord,
    bytes: u64,
    bytes_max: u64,
}

/// A file that is this engine's while it is open.
#[derive(Debug)]
struct OpenRecord {
    file: BufWriter<File>,
    _lock: Flock<File>,
}

impl OpenRecord {
    /// `None`: another engine has it.
    fn open(path: &Path) -> std::io::Result<Option<Self>> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        match Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { file: BufWriter::new(file), _lock: lock })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }
}

impl RecordFile {
    /// The first of `FILE`, `FILE-2`, `FILE-3` and so on that no other engine has.
    fn open(path: &Path, bytes_max: u64) -> Result<Self> {
        let remedy = "Write the path of a file this user may write";
        let wrong = |error| Error::io("opening record_trace", path, error, remedy);
        for number in 1..=limits::RECORDS_MAX {
            let mut name = path.as_os_str().to_owned();
            if number > 1 {
                name.push(format!("-{number}"));
            }
            let path = PathBuf::from(name);
            if let Some(open) = OpenRecord::open(&path).map_err(wrong)? {
                let mut made = Self { path, open, bytes: 0, bytes_max };
                // Times begin anew: what another process wrote is no part of this record.
                made.begin_anew().map_err(wrong)?;
                return Ok(made);
            }
        }
        Err(Error::TryLater { what: "record_trace".to_owned(), holder: "other engines".to_owned() })
    }

    /// What is there becomes the older file, if it is anything.
    fn begin_anew(&mut self) -> std::io::Result<()> {
        self.open.file.flush()?;
        if self.open.file.get_ref().metadata()?.len() == 0 {
            return Ok(());
        }
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        std::fs::rename(&self.path, older)?;
        let taken = || std::io::Error::from(std::io::ErrorKind::ResourceBusy);
        self.open = OpenRecord::open(&self.path)?.ok_or_else(taken)?;
        self.bytes = 0;
        Ok(())
    }

    fn write(&mut self, request: &RecordedRequest) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max / 2 {
            self.begin_anew()?;
        }
        self.bytes += line.len() as u64;
        self.open.file.write_all(&line)
    }
}

/// The record of an engine's requests, if the user wants one. Dropped, it writes what waits.
#[derive(Debug)]
pub(super) struct Recorder {
    lines: Option<Sender<RecordedRequest>>,
    left_out: Arc<AtomicU64>,
    began: Instant,
    /// Names of tenants are hashed with it. It is never written.
    tenant_key: u64,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Begins a record in a file, which is made anew; an older one is kept as `FILE.1`.
    ///
    /// # Errors
    /// [`Error::Io`] naming the path.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::bounded(path, limits::RECORD_BYTES_MAX)
    }

    fn bounded(path: &Path, bytes_max: u64) -> Result<Self> {
        let file = RecordFile::open(path, bytes_max)?;
        let (lines, waiting) = bounded(limits::RECORD_QUEUE);
        let left_out = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&left_out);
        let keep = move || keep(file, &waiting, &counted);
        let thread = std::thread::Builder::new().name("kvcellar-record".to_owned()).spawn(keep);
        let thread = thread.map_err(|_| Error::DeviceDead {
            device: "the record of requests".to_owned(),
            problem: "no thread could be started".to_owned(),
            remedy: "Raise the limit on processes, or remove record_trace".to_owned(),
        })?;
        let tenant_key = RandomState::new().hash_one(0);
        Ok(Self { lines: Some(lines), left_out, began: Instant::now(), tenant_key, thread: Some(thread) })
    }

    /// A request has ended. Its prompt's blocks have so many tokens.
    pub(super) fn record(&self, request: &RequestState, finished: Finished, block_tokens: u32) {
        let Some(lines) = &self.lines else { return };
        let line = RecordedRequest::of(request, finished, block_tokens.max(1), self);
        if lines.try_send(line).is_err() && self.left_out.fetch_add(1, Ordering::Relaxed) == 0 {
            log::warn!("record_trace: the disk is too slow for it: some requests are left out");
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.lines = None;
        // It has said itself what it could not write.
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// Writes lines until nobody sends any more, each batch at once.
fn keep(mut file: RecordFile, waiting: &Receiver<RecordedRequest>, left_out: &AtomicU64) {
    let mut said = false;
    while let Ok(first) = waiting.recv() {
        let batch = std::iter::once(first).chain(waiting.try_iter());
        let written = batch.map(|line| file.write(&line)).filter_map(std::result::Result::err).last();
        let failed = written.or_else(|| file.open.file.flush().err());
        if let Some(error) = failed {
            left_out.fetch_add(1, Ordering::Relaxed);
            if !std::mem::replace(&mut said, true) {
                log::warn!("record_trace: writing {}: {error}. The engine goes on", file.path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::config::Controls;
    use crate::tier::reservation::User;

    fn request(serial: u32, blocks: u8) -> RequestState {
        let user = User { serial, ..User::default() };
        let mut request = RequestState::new(user, Controls::default(), "".into(), None);
        let hashes: Vec<_> = (0..blocks).map(|block| BlockHash::new(&[block + 1; 32]).expect("a hash")).collect();
        request.add_hashes(&hashes);
        request
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    #[test]
    fn requests_are_written_without_their_tokens() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("trace.jsonl");
        let recorder = Recorder::open(&path).expect("a record");
        let mut one = request(1, 4);
        one.controls.tenant = Some("acme".into());
        one.first_hit = crate::tier::requests::FirstHit { local: 16, dram: 32, nvme: 0 };
        recorder.record(&one, Finished { prompt: 50, total: 57 }, 16);
        recorder.record(&request(2, 3), Finished { prompt: 48, total: 48 }, 16);
        drop(recorder);
        let found = lines(&path);
        assert_eq!(found.len(), 2);
        let ids: Vec<_> = found.iter().map(|line| line["hash_ids"].as_array().expect("ids").clone()).collect();
        assert_eq!((ids[0].len(), ids[1].len()), (4, 3), "a partial block has a name, too");
        assert_eq!(ids[0][..3], ids[1][..], "equal prefixes have equal names");
        let tenant = found[0]["tenant"].as_str().expect("a tenant");
        assert!(tenant.len() == 16 && !tenant.contains("acme") && found[1].get("tenant").is_none());
        let numbers = ["input_length", "output_length", "block_tokens", "local_tokens", "dram_tokens", "nvme_tokens"];
        assert_eq!(numbers.map(|name| found[0][name].as_u64()), [50, 7, 16, 16, 32, 0].map(Some));
    }

    #[test]
    fn engines_do_not_share_a_file() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("trace.jsonl");
        let (one, two) = (Recorder::open(&path).expect("a record"), Recorder::open(&path).expect("another"));
        one.record(&request(1, 3), Finished { prompt: 48, total: 50 }, 16);
        (0..2).for_each(|_| two.record(&request(2, 3), Finished { prompt: 48, total: 50 }, 16));
        drop((one, two));
        let second = folder.path().join("trace.jsonl-2");
        assert_eq!((lines(&path).len(), lines(&second).len()), (1, 2));
        let again = Recorder::open(&path).expect("free again");
        drop(again);
        assert_eq!((lines(&path).len(), lines(&second).len()), (0, 2), "the first is taken again");
    }

    #[test]
    fn a_record_is_bounded_and_begins_anew() {
        let folder = tempfile::tempdir().expect("a directory");
        let (path, older) = (folder.path().join("trace.jsonl"), folder.path().join("trace.jsonl.1"));
        let bytes_max = 4_000;
        let recorder = Recorder::bounded(&path, bytes_max).expect("a record");
        for serial in 1..=100 {
            recorder.record(&request(serial, 3), Finished { prompt: 48, total: 50 }, 16);
        }
        drop(recorder);
        let bytes = |path: &Path| std::fs::metadata(path).expect("a file").len();
        assert!(bytes(&path) + bytes(&older) <= bytes_max && !lines(&path).is_empty() && !lines(&older).is_empty());
        let last = lines(&path);
        drop(Recorder::bounded(&path, bytes_max).expect("another process"));
        assert_eq!((lines(&path).len(), lines(&older)), (0, last), "what was there is the older one now");
        assert!(Recorder::open(folder.path()).expect_err("a directory").to_string().contains("record_trace"));
    }
}
