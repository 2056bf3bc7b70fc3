//! The directory meant as `nvme_dir`: its file system, `O_DIRECT`, free space, rights.

use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::statfs::statfs;

use super::finding::{Finding, Status};
use kvcellar_block::size::show;
use kvcellar_engine::limits::SLOT_ALIGN;
use kvcellar_engine::nvme::buffer::Buffer;
use kvcellar_engine::nvme::directory::{self, How};
use kvcellar_engine::nvme::space;
use kvcellar_engine::owned::private_dir::is_ours;

/// Less free space than this holds few blocks.
const FREE_MIN: u64 = 10 << 30;

/// All lines about a directory.
pub fn examine(dir: &Path) -> Vec<Finding> {
    let finding = |status, found: String, remedy| vec![Finding::new(status, "nvme_dir", found, remedy)];
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound && dir.parent().is_some_and(Path::is_dir) => {
            let found = format!("{} does not exist; a start would make it, on the disk of its parent", dir.display());
            return finding(Status::Warning, found, "Mount the disk that is meant, or make the directory");
        }
        Err(error) => {
            let found = format!("{}: {error}", dir.display());
            return finding(Status::Problem, found, "Make the directory, or name another one that exists");
        }
        Ok(found) if !found.is_dir() => {
            return finding(Status::Problem, format!("{} is no directory", dir.display()), "Name a directory");
        }
        Ok(_) => {}
    }
    vec![rights(dir), file_system(dir), free_space(dir), direct(dir)]
}

fn rights(dir: &Path) -> Finding {
    let name = "nvme_dir";
    let own = directory::path(dir);
    match std::fs::symlink_metadata(&own) {
        Ok(found) if !found.is_dir() || !is_ours(&found) => Finding::new(
            Status::Problem,
            name,
            format!("{} is not a private directory of this user", own.display()),
            "Remove it, or set nvme_dir to another directory",
        ),
        Ok(_) => Finding::ok(name, format!("{}, with stores of this user", dir.display())),
        Err(_) => Finding::ok(name, dir.display().to_string()),
    }
}

fn file_system(dir: &Path) -> Finding {
    let name = "file system";
    let found = match statfs(dir) {
        Ok(found) => found.filesystem_type().0,
        Err(errno) => {
            return Finding::new(
                Status::Warning,
                name,
                format!("unknown: {errno}"),
                "Use a local disk with ext4 or xfs",
            );
        }
    };
    // The values are the kernel's (linux/magic.h).
    let (label, good) = match found {
        0xef53 => ("ext4", true),
        0x5846_5342 => ("xfs", true),
        0x9123_683e => ("btrfs", true),
        0x0102_1994 => ("tmpfs", false),
        0x794c_7630 => ("overlay", false),
        0x6969 => ("nfs", false),
        0x6573_5546 => ("fuse", false),
        _ => ("another", true),
    };
    if good {
        return Finding::ok(name, format!("{label} ({found:#x})"));
    }
    Finding::new(Status::Warning, name, label, "It is memory, a layer or a network: use a local disk with ext4 or xfs")
}

fn free_space(dir: &Path) -> Finding {
    let name = "free space";
    match space::free_bytes(dir) {
        Ok(free) if free >= FREE_MIN => Finding::ok(name, show(free)),
        Ok(free) => Finding::new(Status::Warning, name, show(free), "Free some, or name a larger disk"),
        Err(error) => Finding::new(Status::Problem, name, error.to_string(), "Name another directory"),
    }
}

/// Writes a page and reads it back, in a file that has no name any more when it is used.
fn direct(dir: &Path) -> Finding {
    let name = "O_DIRECT";
    let path = dir.join(format!(".kvcellar-doctor-{}", std::process::id()));
    let problem = |what: &str, error: String| {
        Finding::new(
            Status::Problem,
            name,
            format!("{what}: {error}"),
            "Give this user the rights, or name another directory",
        )
    };
    let file = match directory::open(&path, How::New).and_then(|_made| directory::open(&path, How::Direct)) {
        Ok(file) => file,
        Err(error) => return problem("a file cannot be made", error.to_string()),
    };
    let mut is_direct = directory::is_direct(&file);
    if let Err(error) = std::fs::remove_file(&path) {
        return problem("a file cannot be removed", error.to_string());
    }
    let mut page = Buffer::pages(SLOT_ALIGN as usize);
    page.bytes_mut().fill(0x5a);
    if let Err(error) = file.write_all_at(page.bytes(), 0) {
        if error.raw_os_error() != Some(libc::EINVAL) {
            return problem("a page cannot be written", error.to_string());
        }
        is_direct = false;
    } else {
        page.bytes_mut().fill(0);
        if let Err(error) = file.read_exact_at(page.bytes_mut(), 0) {
            return problem("a page cannot be read", error.to_string());
        }
        if page.bytes().iter().any(|byte| *byte != 0x5a) {
            return problem("a page", "it was read back with other bytes".to_owned());
        }
    }
    if is_direct {
        return Finding::ok(name, format!("works with pages of {}", show(SLOT_ALIGN)));
    }
    Finding::new(
        Status::Warning,
        name,
        "refused or without meaning here",
        "Transfers go through the page cache and take memory and CPU from the model: use a local disk with ext4 or xfs",
    )
}
