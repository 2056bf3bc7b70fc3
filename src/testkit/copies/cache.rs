//! A KV cache in plain memory, and an own idea of where each byte of a block lies in it.
//!
//! The positions are computed from the layout's definition and not with `GroupRuns`, which is what
//! is tested.

use std::cell::UnsafeCell;

use kvcellar_engine::gpu::views::{GroupRuns, LayerView};

/// How layers and blocks are nested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// LBHNC: one tensor a layer.
    LayerMajor,
    /// BLHNC: all layers of a kernel block lie together.
    BlockMajor,
}

/// A KV cache's dimensions.
#[derive(Debug, Clone)]
pub struct Shape {
    pub layout: Layout,
    /// Layers of each group; group g shows the first of the memory's layers, so that groups overlay
    /// each other.
    pub groups: Vec<usize>,
    /// Kernel blocks of one block.
    pub ratio: usize,
    /// Bytes of one layer's kernel block.
    pub page: usize,
    /// Unused bytes after each page.
    pub padding: usize,
    pub blocks: usize,
    /// Every layer is named twice, as by layers that share KV.
    pub aliased: bool,
}

impl Shape {
    pub fn plain(layers: usize) -> Self {
        Self {
            layout: Layout::LayerMajor,
            groups: vec![layers],
            ratio: 1,
            page: 40,
            padding: 0,
            blocks: 8,
            aliased: false,
        }
    }

    fn layers(&self) -> usize {
        self.groups.iter().copied().max().expect("a group")
    }

    fn bytes(&self) -> usize {
        self.layers() * self.blocks * self.ratio * (self.page + self.padding)
    }

    fn page_start(&self, layer: usize, page: usize) -> usize {
        let room = self.page + self.padding;
        match self.layout {
            Layout::LayerMajor => (layer * self.blocks * self.ratio + page) * room,
            Layout::BlockMajor => (page * self.layers() + layer) * room,
        }
    }

    /// Where each byte of a block lies in the memory, in the order of the slot.
    pub fn positions(&self, group: usize, block: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.groups[group]).flat_map(move |layer| {
            (0..self.ratio).flat_map(move |page| {
                let start = self.page_start(layer, block * self.ratio + page);
                start..start + self.page
            })
        })
    }

    pub fn block_bytes(&self, group: usize) -> u64 {
        (self.groups[group] * self.ratio * self.page) as u64
    }
}

/// The memory. Copiers write it through addresses; tests look at it only when no order is under
/// way.
pub struct KvCache {
    pub shape: Shape,
    memory: Box<[UnsafeCell<u8>]>,
}

impl KvCache {
    pub fn new(shape: Shape) -> Self {
        let memory = (0..shape.bytes()).map(|_| UnsafeCell::new(0)).collect();
        Self { shape, memory }
    }

    /// What vLLM would register for this cache.
    pub fn runs(&self) -> Vec<GroupRuns> {
        (0..self.shape.groups.len())
            .map(|group| GroupRuns::resolve(group, &self.views(group)).expect("a layout that is supported"))
            .collect()
    }

    fn views(&self, group: usize) -> Vec<LayerView> {
        let shape = &self.shape;
        let view = |layer: usize| {
            let (first, second) = (shape.page_start(layer, 0), shape.page_start(layer, 1));
            LayerView {
                address: self.memory.as_ptr() as u64 + first as u64,
                stride_bytes: (second - first) as u64,
                page_bytes: shape.page as u64,
                pages_per_block: shape.ratio as u32,
                pages: (shape.blocks * shape.ratio) as u64,
            }
        };
        (0..shape.groups[group]).flat_map(|layer| vec![view(layer); 1 + usize::from(shape.aliased)]).collect()
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: the memory lives as long as `self`, and no order is under way when a test looks.
        self.memory.iter().map(|cell| unsafe { *cell.get() }).collect()
    }

    pub fn set(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.memory.len());
        for (cell, byte) in self.memory.iter().zip(bytes) {
            // SAFETY: as in `bytes`.
            unsafe { *cell.get() = *byte };
        }
    }

    /// A block's bytes in the order of the slot.
    pub fn block(&self, group: usize, block: usize) -> Vec<u8> {
        block_of(&self.bytes(), &self.shape, group, block)
    }
}

/// A block's bytes in the order of the slot, out of a copy of the memory.
pub fn block_of(memory: &[u8], shape: &Shape, group: usize, block: usize) -> Vec<u8> {
    shape.positions(group, block).map(|at| memory[at]).collect()
}

/// Puts a block's bytes into a copy of the memory.
pub fn put_block(memory: &mut [u8], shape: &Shape, group: usize, block: usize, bytes: &[u8]) {
    for (at, byte) in shape.positions(group, block).zip(bytes) {
        memory[at] = *byte;
    }
}
