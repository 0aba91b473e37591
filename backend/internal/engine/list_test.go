package engine

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/bits"
	"slices"
	"strconv"
	"testing"

	"github.com/fleetquota/fleetquota/quota/driver"
)

// dict is a server whose table of keys has a size of its own at each SCAN. It walks over the table as Redis does: bucket by bucket, in the
// order of the bucket numbers' bits read backwards, so that a cursor is good for a table of any size.
type dict struct {
	fake
	keys  []string
	sizes []int // bits of the numbers of buckets, for the SCANs in turn
	scans int
}

func (d *dict) Scan(_ context.Context, _, _ string, args []string) (Scanned, error) {
	cursor, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return Scanned{}, err
	}
	count, err := strconv.Atoi(args[len(args)-1])
	if err != nil {
		return Scanned{}, err
	}
	mask := uint64(1)<<d.sizes[d.scans%len(d.sizes)] - 1
	d.scans++
	var found []string
	for {
		for _, k := range d.keys {
			h := fnv.New64a()
			h.Write([]byte(k))
			if h.Sum64()&mask == cursor&mask {
				found = append(found, k)
			}
		}
		cursor = bits.Reverse64(bits.Reverse64(cursor|^mask) + 1)
		if cursor == 0 || len(found) >= count {
			return Scanned{Info: "run_id:1\r\n", Cursor: strconv.FormatUint(cursor, 10), Keys: found}, nil
		}
	}
}

// TestListWhileTableChanges: each key is listed, on pages of any size, by a server whose table has another size at each SCAN: also at the
// second half of a step that had more keys than the page.
func TestListWhileTableChanges(t *testing.T) {
	want := map[driver.ListedKey]bool{}
	var keys []string
	for i := range 60 {
		k := driver.ListedKey{Limit: "tokens", Key: fmt.Sprint("key-", i)}
		want[k] = true
		keys = append(keys, DefaultPrefix+string(driver.AppendKey(nil, k.Limit, k.Key)))
	}
	for _, sizes := range [][]int{{0}, {6}, {0, 6}, {6, 0}, {6, 6, 2, 2}, {2, 2, 6, 6}, {0, 3, 6, 3}, {4, 5, 6, 5}, {6, 6, 6, 6, 6, 1}, {1, 1, 1, 5}} {
		for size := 1; size <= 61; size += 1 + size/4 {
			d := &dict{keys: keys, sizes: sizes}
			s, err := New(d, false, Options{Batching: BatchAll})
			if err != nil {
				t.Fatal(err)
			}
			got := map[driver.ListedKey]bool{}
			l := driver.Listing{Size: size}
			const most = 2000 // pages
			for pages := 0; ; pages++ {
				page, err := s.List(bg, l)
				if err != nil || pages == most || len(page.Keys) > size {
					t.Fatalf("tables of %v bits, page %d of %d keys: got %d keys, error %v, want up to %d, on %d pages or fewer", sizes, pages+1, size, len(page.Keys), err, size, most)
				}
				for i, k := range page.Keys {
					got[k] = true
					if slices.Contains(page.Keys[:i], k) {
						t.Errorf("tables of %v bits, page %d of %d keys: got %v twice, want it once on a page", sizes, pages+1, size, k)
					}
				}
				if l.Cursor = page.Next; l.Cursor == "" {
					break
				}
			}
			for k := range want {
				if !got[k] {
					t.Errorf("tables of %v bits, pages of %d keys: got no %v, want it", sizes, size, k)
				}
			}
			s.Close()
		}
	}
}
