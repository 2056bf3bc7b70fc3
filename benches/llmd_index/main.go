// Measures llm-d's index of blocks in memory with the events and questions of `kvcellar bench index`,
// which starts this program and reads its answer. One round in one process; what is read from the
// file is not a part of any time.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"sort"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	"github.com/llm-d/llm-d-kv-cache/pkg/kvcache/kvblock"
	"k8s.io/apimachinery/pkg/util/sets"
	"sigs.k8s.io/controller-runtime/pkg/log"
)

const model = "model"

// More than any block of the benchmark has holders: llm-d's default of 10 would forget the others.
const holdersMax = 2048

var tiers = []string{"gpu", "cpu"}

// event is a stored or a removed event, already decoded.
type event struct {
	removed   bool
	engine    uint32
	tier      uint8
	hasParent bool
	parent    uint64
	hashes    []kvblock.BlockHash
	tokens    []uint32
}

// held says that an engine holds blocks of a prompt in a tier.
type held struct{ Engine, First, Count, Tier uint32 }

// scene is a prompt and who holds what of it.
type scene struct {
	tokens []uint32
	held   []held
}

// timing is what one scene took.
type timing struct {
	KeysMs   float64 `json:"keys_ms"`
	LookupMs float64 `json:"lookup_ms"`
	AllMs    float64 `json:"all_ms"`
	AllP99Ms float64 `json:"all_p99_ms"`
	Engines  int     `json:"engines"`
	Blocks   uint64  `json:"blocks"`
}

// result is one round.
type result struct {
	Go            string   `json:"go"`
	Index         string   `json:"index"`
	AppliedPerS   float64  `json:"applied_per_s"`
	BytesAHolder  float64  `json:"bytes_a_holder"`
	HoldersBlocks uint64   `json:"blocks_of_first_prompt"`
	Scenes        []timing `json:"scenes"`
}

// reader reads the file that `kvcellar bench index` writes.
type reader struct{ from *bufio.Reader }

func read[T any](r reader, value T) T {
	if err := binary.Read(r.from, binary.LittleEndian, value); err != nil {
		fail(fmt.Errorf("the file ends too early: %w", err))
	}
	return value
}

func (r reader) number() uint32 { return *read(r, new(uint32)) }

func (r reader) tokens() []uint32 { return read(r, make([]uint32, r.number())) }

func (r reader) event() event {
	head := read(r, new(struct {
		Removed, Tier, HasParent, _ uint8
		Engine                      uint32
		Parent                      uint64
	}))
	made := event{removed: head.Removed != 0, engine: head.Engine, tier: head.Tier, hasParent: head.HasParent != 0, parent: head.Parent}
	made.hashes = read(r, make([]kvblock.BlockHash, r.number()))
	made.tokens = r.tokens()
	return made
}

func (r reader) scene() scene {
	return scene{tokens: r.tokens(), held: read(r, make([]held, r.number()))}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "llmd_index:", err)
	os.Exit(1)
}

func must[T any](value T, err error) T {
	if err != nil {
		fail(err)
	}
	return value
}

// index is llm-d's index in memory with its own block keys.
type index struct {
	blocks *kvblock.InMemoryIndex
	keys   kvblock.TokenProcessor
}

func newIndex() index {
	config := kvblock.DefaultInMemoryIndexConfig()
	config.PodCacheSize = holdersMax
	return index{must(kvblock.NewInMemoryIndex(config)), kvblock.NewChunkedTokenDatabase(kvblock.DefaultTokenProcessorConfig())}
}

// entry is how an engine's copy in a tier is written down.
func entry(engine uint32, tier uint8) []kvblock.PodEntry {
	return []kvblock.PodEntry{{PodIdentifier: strconv.Itoa(int(engine)), DeviceTier: tiers[tier]}}
}

// apply does with an event what llm-d's event pool does after decoding.
func (i index) apply(ctx context.Context, it *event) {
	copies := entry(it.engine, it.tier)
	if it.removed {
		for _, hash := range it.hashes {
			if err := i.blocks.Evict(ctx, hash, copies); err != nil {
				fail(err)
			}
		}
		return
	}
	parent := kvblock.EmptyBlockHash
	if it.hasParent {
		parent = must(i.blocks.GetRequestKey(ctx, kvblock.BlockHash(it.parent)))
	}
	keys := i.keys.TokensToKVBlockKeys(parent, it.tokens, model)
	if err := i.blocks.Add(ctx, it.hashes, keys, copies); err != nil {
		fail(err)
	}
}

// prefixes are the leading blocks that each engine holds.
func prefixes(keys []kvblock.BlockHash, found map[kvblock.BlockHash][]kvblock.PodEntry) map[string]uint64 {
	lengths := make(map[string]uint64)
	for at, key := range keys {
		goesOn := false
		for _, it := range found[key] {
			if length := lengths[it.PodIdentifier]; length == uint64(at) {
				lengths[it.PodIdentifier] = length + 1
				goesOn = true
			}
		}
		if !goesOn {
			break
		}
	}
	return lengths
}

// ask goes from tokens to prefixes. It returns when it began, had keys, had holders, and had ended.
func (i index) ask(ctx context.Context, tokens []uint32) ([4]time.Time, map[string]uint64) {
	began := time.Now()
	keys := i.keys.TokensToKVBlockKeys(kvblock.EmptyBlockHash, tokens, model)
	keyed := time.Now()
	found := must(i.blocks.Lookup(ctx, keys, sets.New[string]()))
	looked := time.Now()
	lengths := prefixes(keys, found)
	return [4]time.Time{began, keyed, looked, time.Now()}, lengths
}

func total(lengths map[string]uint64) uint64 {
	sum := uint64(0)
	for _, length := range lengths {
		sum += length
	}
	return sum
}

func percentile(sorted []float64, percent int) float64 { return sorted[(len(sorted)-1)*percent/100] }

func measureScene(ctx context.Context, it *scene, questions int) timing {
	made := newIndex()
	keys := made.keys.TokensToKVBlockKeys(kvblock.EmptyBlockHash, it.tokens, model)
	for _, part := range it.held {
		blocks := keys[part.First : part.First+part.Count]
		// The engine's own names do not matter to a question.
		if err := made.blocks.Add(ctx, blocks, blocks, entry(part.Engine, uint8(part.Tier))); err != nil {
			fail(err)
		}
	}
	runtime.GC()
	var times [3][]float64
	var lengths map[string]uint64
	for range questions {
		var at [4]time.Time
		at, lengths = made.ask(ctx, it.tokens)
		for part, ends := range [3][2]int{{0, 1}, {1, 2}, {0, 3}} {
			times[part] = append(times[part], at[ends[1]].Sub(at[ends[0]]).Seconds()*1e3)
		}
	}
	for _, part := range times {
		sort.Float64s(part)
	}
	return timing{
		KeysMs: percentile(times[0], 50), LookupMs: percentile(times[1], 50), AllMs: percentile(times[2], 50),
		AllP99Ms: percentile(times[2], 99), Engines: len(lengths), Blocks: total(lengths),
	}
}

func heap() float64 {
	runtime.GC()
	var now runtime.MemStats
	runtime.ReadMemStats(&now)
	return float64(now.HeapAlloc)
}

func main() {
	if len(os.Args) != 2 {
		fail(fmt.Errorf("usage: llmd_index FILE, as written by kvcellar bench index --beside"))
	}
	log.SetLogger(logr.Discard())
	ctx := context.Background()
	file := must(os.Open(os.Args[1]))
	r := reader{bufio.NewReaderSize(file, 1<<20)}
	questions := int(r.number())
	events := make([]event, r.number())
	for at := range events {
		events[at] = r.event()
	}
	first := r.tokens()
	scenes := make([]scene, r.number())
	for at := range scenes {
		scenes[at] = r.scene()
	}
	if _, err := r.from.ReadByte(); err != io.EOF {
		fail(fmt.Errorf("the file is longer than it says"))
	}

	made, before := newIndex(), heap()
	count, holders := 0, 0
	began := time.Now()
	for at := range events {
		made.apply(ctx, &events[at])
	}
	took := time.Since(began).Seconds()
	for at := range events {
		count += len(events[at].hashes)
		if events[at].removed {
			holders -= len(events[at].hashes)
		} else {
			holders += len(events[at].hashes)
		}
	}
	out := result{Go: runtime.Version(), Index: version(), AppliedPerS: float64(count) / took}
	out.BytesAHolder = (heap() - before) / float64(holders)
	_, lengths := made.ask(ctx, first)
	out.HoldersBlocks = total(lengths)
	for at := range scenes {
		out.Scenes = append(out.Scenes, measureScene(ctx, &scenes[at], questions))
	}
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		fail(err)
	}
}

// version is that of llm-d's module in this program.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, it := range info.Deps {
		if it.Replace != nil && it.Path == "github.com/llm-d/llm-d-kv-cache" {
			return it.Replace.Path + " " + it.Replace.Version
		}
	}
	return "unknown"
}
