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
