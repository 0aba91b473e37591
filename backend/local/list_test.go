package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Keys that stay are listed while the tables of the shards grow and shrink by others; keys that are whole again are not, nor
// are request ids.
func TestListWhileTablesChange(t *testing.T) {
	s, clock := withClock(0)
	long, short := bucket("long", 5, 1000*time.Hour), bucket("short", 5, time.Second)
	const stay = 3000
	for i := range stay {
		take(t, s, quota.Charge{Limit: long, Key: fmt.Sprint("stays/", i), Cost: 1, ID: fmt.Sprint(i)})
	}
	for _, size := range []int{1, 7, 100, driver.MaxPage} {
		seen := map[driver.ListedKey]bool{}
		l := driver.Listing{Size: size}
		for n := 0; ; n++ {
			page, err := s.List(bg, l)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range page.Keys {
				if k.Limit == long.Name() {
					seen[k] = true
				}
			}
			if l.Cursor = page.Next; l.Cursor == "" {
				break
			}
			for i := range min(10*size, 2000) { // others come, and are whole again
				take(t, s, quota.Charge{Limit: short, Key: fmt.Sprint("goes/", n, "/", i), Cost: 1})
			}
			if n%20 == 19 {
				clock.add(5 * time.Second)
			}
		}
		if len(seen) != stay {
			t.Errorf("keys that stay, on pages of %d: got %d, want %d", size, len(seen), stay)
		}
	}
	clock.add(10 * time.Second)
	page, err := s.List(bg, driver.Listing{Limits: []string{short.Name()}, Size: driver.MaxPage})
	if err != nil || len(page.Keys) > 0 || page.Next != "" {
		t.Errorf("a listing of keys that are whole again: got %d keys, cursor %q, %v, want none", len(page.Keys), page.Next, err)
	}
}

// Keys of one tag, which 32 bits of a hash may give to several, are each listed once, also where a page ends between them.
func TestListKeysOfOneTag(t *testing.T) {
	s, clock := withClock(0)
	limits := []*quota.Limit{bucket("a", 5, time.Hour), bucket("b", 5, time.Hour)}
	const hash, keys = 7<<32 | 3, 30
	for i := range keys {
		for _, l := range limits {
			c, now := quota.Charge{Limit: l, Key: fmt.Sprint("k", i), Cost: 1}, quota.Micros(clock.time().UnixMicro())
			var it driver.Item
			var d quota.Decision
			if err := driver.ApplyOne(&c, &it, now, &d); err != nil {
				t.Fatal(err)
			}
			s.keep(&s.shards[hash%shardCount], hash, -1, &c, &it, &d)
		}
	}
	for size := 1; size <= 2*keys+1; size++ {
		times := map[driver.ListedKey]int{}
		l := driver.Listing{Size: size}
		for pages := 0; ; pages++ {
			page, err := s.List(bg, l)
			if err != nil || pages > 2*keys {
				t.Fatalf("page %d of %d keys: got error %v, want the last of %d or fewer", pages+1, size, err, 2*keys)
			}
			for _, k := range page.Keys {
				times[k]++
			}
			if l.Cursor = page.Next; l.Cursor == "" {
				break
			}
		}
		for k, n := range times {
			if n != 1 {
				t.Errorf("%v, on pages of %d: got it %d times, want once", k, size, n)
			}
		}
		if len(times) != 2*keys {
			t.Errorf("keys on pages of %d: got %d, want %d", size, len(times), 2*keys)
		}
	}
}
