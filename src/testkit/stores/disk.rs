//! The plainest disk: transfers are done while they are submitted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use kvcellar_block::error::Result;
use kvcellar_engine::nvme::disk::{Completion, Completions, Description, Disk, DiskError, Kind, Operation};

pub struct PlainDisk {
    files: Mutex<Vec<File>>,
    completions: Arc<dyn Completions>,
    /// Reads of this segment fail.
    pub broken: Mutex<Option<u32>>,
    /// The most operations that one call brought.
    pub deepest: Mutex<usize>,
}

impl PlainDisk {
    pub fn new(files: Vec<File>, completions: Arc<dyn Completions>) -> Self {
        Self { files: Mutex::new(files), completions, broken: Mutex::new(None), deepest: Mutex::new(0) }
    }

    fn transfer(&self, operation: &mut Operation) -> std::result::Result<(), DiskError> {
        let files = self.files.lock().expect("unpoisoned");
        let file = files.get(operation.segment as usize).ok_or(DiskError::NoSegment)?;
        if *self.broken.lock().expect("unpoisoned") == Some(operation.segment) {
            return Err(DiskError::Os(libc::EIO));
        }
        let outcome = match operation.kind {
            Kind::Read => file.read_exact_at(operation.buffer.bytes_mut(), operation.offset),
            Kind::Write => file.write_all_at(operation.buffer.bytes(), operation.offset),
        };
        outcome.map_err(|error| DiskError::Os(error.raw_os_error().unwrap_or(libc::EIO)))
    }
}

impl Disk for PlainDisk {
    fn submit(&self, operations: Vec<Operation>) {
        let mut deepest = self.deepest.lock().expect("unpoisoned");
        *deepest = operations.len().max(*deepest);
        let complete = |mut operation: Operation| {
            let outcome = self.transfer(&mut operation);
            Completion { token: operation.token, kind: operation.kind, buffer: operation.buffer, outcome }
        };
        self.completions.complete(operations.into_iter().map(complete).collect());
    }

    fn add_segment(&self, file: File) -> Result<u32> {
        let mut files = self.files.lock().expect("unpoisoned");
        files.push(file);
        Ok(files.len() as u32 - 1)
    }

    fn describe(&self) -> Description {
        Description { engine: "plain", direct: false, registered: false, why: String::new() }
    }

    fn in_flight(&self) -> usize {
        0
    }
}
