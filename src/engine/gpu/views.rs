//! Where the bytes of a block lie in vLLM's KV cache on this rank.
//!
//! vLLM hands out one tensor view a layer. A view may be finer than a block (`kernel blocks`),
//! several names may show the same bytes (layers that share KV), and groups overlay each other. All
//! of that is resolved here once, into runs: contiguous pieces at a fixed distance from block to
//! block.

use serde::Deserialize;

use kvcellar_block::error::{Error, Result};

/// One layer's KV tensor as the worker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct LayerView {
    /// Address of block 0.
    pub address: u64,
    /// Bytes from one kernel block to the next.
    pub stride_bytes: u64,
    /// Contiguous bytes of one kernel block.
    pub page_bytes: u64,
    /// Kernel blocks of one block.
    pub pages_per_block: u32,
    /// Kernel blocks in the tensor.
    pub pages: u64,
}

/// A contiguous piece of every block of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRun {
    /// Address of the piece in block 0.
    pub address: u64,
    /// Bytes from one block to the next.
    pub block_stride: u64,
    /// Length in bytes.
    pub len: u64,
}

/// All pieces of a group's blocks, in the order in which they lie in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRuns {
    runs: Vec<BlockRun>,
    blocks: u64,
    block_bytes: u64,
}

impl GroupRuns {
    /// Resolves the views of a group's layers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for views that overlap their own next page, hold no whole number of
    /// blocks, or disagree on it.
    pub fn resolve(group: usize, layers: &[LayerView]) -> Result<Self> {
        let refuse = |why: &str| Error::Unsupported {
            what: format!("the KV cache layout of group {group}"),
            why: why.to_owned(),
            remedy: "Set \"unsupported_groups\": \"bypass\" to serve without KV Cellar".to_owned(),
        };
        let mut seen: Vec<LayerView> = Vec::with_capacity(layers.len());
        let mut runs: Vec<BlockRun> = Vec::new();
        let mut blocks = None;
        for layer in layers {
            // Layers that share KV show the same bytes twice.
            if seen.iter().any(|other| (other.address, other.stride_bytes) == (layer.address, layer.stride_bytes)) {
                continue;
            }
            seen.push(*layer);
            let ratio = u64::from(layer.pages_per_block);
            if ratio == 0 || layer.page_bytes == 0 || layer.address == 0 || !layer.pages.is_multiple_of(ratio) {
                return Err(refuse("a layer's tensor holds no whole number of blocks"));
            }
            if layer.stride_bytes < layer.page_bytes && layer.pages > 1 {
                return Err(refuse("a layer's pages overlap"));
            }
            if *blocks.get_or_insert(layer.pages / ratio) != layer.pages / ratio {
                return Err(refuse("layers have different numbers of blocks"));
            }
            for page in 0..ratio {
                let address = layer.address + page * layer.stride_bytes;
                push(&mut runs, BlockRun { address, block_stride: ratio * layer.stride_bytes, len: layer.page_bytes });
            }
        }
        // A pipeline stage may have no layer of a group: its blocks have no bytes here, whatever
        // their number.
        let blocks = blocks.unwrap_or(u64::MAX);
        let block_bytes = runs.iter().map(|run| run.len).sum();
        Ok(Self { runs, blocks, block_bytes })
    }

    /// Bytes of one block on this rank.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Blocks in the KV cache.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Address and length of each piece of a block. `None`: there is no such block.
    pub fn pieces(&self, block: u32) -> Option<impl Iterator<Item = (u64, usize)> + '_> {
        let block = u64::from(block);
        (block < self.blocks)
            .then(|| self.runs.iter().map(move |run| (run.address + block * run.block_stride, run.len as usize)))
    }
}

/// Appends a run, growing the last one when they are neighbours in every block.
fn push(runs: &mut Vec<BlockRun>, run: BlockRun) {
    if let Some(last) = runs.last_mut()
        && last.block_stride == run.block_stride
        && last.address + last.len == run.address
    {
        last.len += run.len;
        return;
    }
    runs.push(run);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(address: u64, stride_bytes: u64, page_bytes: u64, pages_per_block: u32) -> LayerView {
        LayerView { address, stride_bytes, page_bytes, pages_per_block, pages: 10 * u64::from(pages_per_block) }
    }

    fn resolve(layers: &[LayerView]) -> GroupRuns {
        GroupRuns::resolve(0, layers).expect("valid")
    }

    #[test]
    fn layer_major_memory_gives_one_run_a_layer() {
        let group = resolve(&[view(1000, 100, 100, 1), view(2000, 100, 100, 1)]);
        let pieces: Vec<_> = group.pieces(3).expect("exists").collect();
        assert_eq!(pieces, [(1300, 100), (2300, 100)]);
        assert_eq!((group.block_bytes(), group.blocks()), (200, 10));
        assert!(group.pieces(10).is_none());
    }

    #[test]
    fn block_major_memory_gives_one_run_a_block() {
        let group = resolve(&[view(1000, 300, 100, 1), view(1100, 300, 100, 1), view(1200, 300, 100, 1)]);
        assert_eq!(group.pieces(2).expect("exists").collect::<Vec<_>>(), [(1600, 300)]);
    }

    #[test]
    fn kernel_blocks_join_where_they_touch() {
        let dense = resolve(&[view(1000, 50, 50, 4)]);
        assert_eq!(dense.pieces(1).expect("exists").collect::<Vec<_>>(), [(1200, 200)]);
        let padded = resolve(&[view(1000, 60, 50, 2)]);
        assert_eq!(padded.pieces(1).expect("exists").collect::<Vec<_>>(), [(1120, 50), (1180, 50)]);
    }

    #[test]
    fn shared_layers_count_once() {
        let group = resolve(&[view(1000, 100, 100, 1), view(1000, 100, 100, 1)]);
        assert_eq!(group.block_bytes(), 100);
    }

    #[test]
    fn a_group_without_layers_has_blocks_without_bytes() {
        let group = resolve(&[]);
        assert_eq!((group.block_bytes(), group.pieces(9).expect("exists").count()), (0, 0));
    }

    #[test]
    fn impossible_views_are_refused() {
        for layers in [
            vec![view(0, 100, 100, 1)],
            vec![view(1000, 50, 100, 1)],
            vec![view(1000, 100, 100, 1), LayerView { pages: 5, ..view(9000, 100, 100, 1) }],
            vec![LayerView { pages: 9, ..view(1000, 100, 100, 2) }],
        ] {
            assert!(GroupRuns::resolve(0, &layers).is_err(), "{layers:?}");
        }
    }
}
