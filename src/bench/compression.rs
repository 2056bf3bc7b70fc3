//! `kvcellar bench compression DIR`: whether lossless compression would pay for the blocks in a
//! store.
//!
//! Measured, block by block, on blocks that a real engine left: zstd on the bytes as they lie, and
//! on byte planes (the first bytes of all values, then the second ones, ...), since the high bytes
//! of neighbouring 16-bit values are alike and the low ones are noise. Every block is taken apart
//! again and compared. CPU time is this process's, and it has one thread. Not measured: writing
//! less to disk, which depends on the device.

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;

use super::nvme::meter::{Reading, metered};
use super::report::{Measured, measured, report};
use kvcellar_block::error::{Error, Result};
use kvcellar_engine::nvme::{inspection, registry};

const MIB: f64 = (1 << 20) as f64;

/// What to look at.
#[derive(Debug, Clone, Args)]
pub struct CompressionBench {
    /// The directory given as `nvme_dir`. Its stores must be used by no engine.
    pub dir: PathBuf,
    /// At most so many blocks.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    pub blocks: u64,
    /// Bytes of one value of the KV cache: 2 for bf16 and fp16, 1 for fp8.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=8))]
    pub value_bytes: u64,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Values' bytes, plane after plane. What does not fill a value stays as it is, at the end.
fn split(bytes: &[u8], width: usize) -> Vec<u8> {
    let whole = bytes.len() - bytes.len() % width;
    let mut planes = Vec::with_capacity(bytes.len());
    for plane in 0..width {
        planes.extend(bytes[..whole].iter().skip(plane).step_by(width));
    }
    planes.extend_from_slice(&bytes[whole..]);
    planes
}

/// Undoes [`split`].
fn merge(planes: &[u8], width: usize) -> Vec<u8> {
    let count = planes.len() / width;
    let mut bytes = vec![0; planes.len()];
    for plane in 0..width {
        let values = bytes[..count * width].iter_mut().skip(plane).step_by(width);
        values.zip(&planes[plane * count..]).for_each(|(to, from)| *to = *from);
    }
    bytes[count * width..].copy_from_slice(&planes[count * width..]);
    bytes
}

/// One way to compress, and what it did with each block.
struct Codec {
    name: &'static str,
    level: i32,
    width: usize,
    ratios: Vec<f64>,
    pack_ms: Vec<f64>,
    unpack_ms: Vec<f64>,
}

impl Codec {
    fn new(name: &'static str, level: i32, width: usize) -> Self {
        Self { name, level, width, ratios: Vec::new(), pack_ms: Vec::new(), unpack_ms: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let (level, width) = (self.level, self.width);
        let fail = |error: std::io::Error| Error::lost("benchmark", format!("zstd: {error}"));
        let (packed, packing) = metered(|| {
            let planes = if width > 1 { split(bytes, width) } else { Vec::new() };
            zstd::bulk::compress(if width > 1 { &planes } else { bytes }, level).map_err(fail)
        })?;
        let (unpacked, unpacking) = metered(|| {
            let planes = zstd::bulk::decompress(&packed, bytes.len()).map_err(fail)?;
            Ok(if width > 1 { merge(&planes, width) } else { planes })
        })?;
        if unpacked != bytes {
            return Err(Error::lost("benchmark", format!("{} gave other bytes back", self.name)));
        }
        let per_mib = |reading: Reading| reading.cpu_s * 1e3 * MIB / bytes.len() as f64;
        self.ratios.push(bytes.len() as f64 / packed.len() as f64);
        self.pack_ms.push(per_mib(packing));
        self.unpack_ms.push(per_mib(unpacking));
        Ok(())
    }

    fn results(self) -> [Measured; 3] {
        let name = |what: &str| format!("{}_{what}", self.name);
        [
            measured(&name("ratio"), "", self.ratios),
            measured(&name("compress"), "ms/MiB", self.pack_ms),
            measured(&name("decompress"), "ms/MiB", self.unpack_ms),
        ]
    }
}

fn measure(options: &CompressionBench) -> Result<Vec<Measured>> {
    let width = options.value_bytes as usize;
    let mut contenders = [
        Codec::new("zstd_1", 1, 1),
        Codec::new("zstd_3", 3, 1),
        Codec::new("planes_zstd_1", 1, width),
        Codec::new("planes_zstd_3", 3, width),
    ];
    let bar = ProgressBar::new(options.blocks);
    let mut left = options.blocks;
    kvcellar_engine::pool::directory::present("DIR", &options.dir)?;
    for store in registry::list(&options.dir)? {
        if store.state == kvcellar_engine::owned::listing::Ownership::InUse {
            eprintln!("kvcellar: {} is skipped: an engine uses it", store.name);
            continue;
        }
        inspection::payloads(&store.path, &mut |payload| {
            for contender in &mut contenders {
                contender.take(payload)?;
            }
            bar.inc(1);
            left -= 1;
            Ok(left > 0)
        })?;
        if left == 0 {
            break;
        }
    }
    bar.finish_and_clear();
    if left == options.blocks {
        let problem = format!("no block below {}", options.dir.display());
        return Err(Error::config("DIR", problem, "Name the `nvme_dir` of an engine that has stopped"));
    }
    Ok(contenders.into_iter().flat_map(Codec::results).collect())
}

/// Runs the measurement and prints it.
///
/// # Errors
/// [`Error`] of a directory that is missing, or has no block that can be read now.
pub fn run(options: &CompressionBench) -> Result<()> {
    let results = measure(options)?;
    if options.json {
        println!("{:#}", report(&results, &[]));
    } else {
        super::report::print(&results, &[], 3);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{merge, split};

    #[test]
    fn planes_are_put_together_again() {
        assert_eq!(split(&[1, 2, 3, 4, 5], 2), [1, 3, 2, 4, 5]);
        for (len, width) in [(0, 2), (1, 2), (2, 2), (7, 2), (9, 4), (64, 1), (65, 8)] {
            let bytes: Vec<u8> = (0..len).map(|byte: u8| byte.wrapping_mul(37)).collect();
            assert_eq!(merge(&split(&bytes, width), width), bytes, "{len} bytes, {width} planes");
        }
    }
}
