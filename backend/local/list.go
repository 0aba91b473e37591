package local

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// List returns a page of the keys that the store holds and that are not whole again. It looks at the shards one after the
// other, and holds the lock of one, which has a 256th of the keys, while it looks at all of its keys. A cursor is good for the
// store that gave it. See driver.Lister.
func (s *Store) List(ctx context.Context, l driver.Listing) (driver.Page, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return driver.Page{}, err
	}
	if err := l.Check(); err != nil {
		return driver.Page{}, err
	}
	at, ok := s.parsePlace(l.Cursor)
	if !ok {
		return driver.Page{}, driver.BadCursor(l.Cursor, `"", or the Page.Next of a page of the same store`)
	}
	var page driver.Page
	for ; at.shard < shardCount; at = (place{shard: at.shard + 1}) {
		last, more := s.listShard(at, &l, &page)
		if more {
			page.Next = s.formatPlace(last)
			break
		}
	}
	return page, nil
}

// place is a place in a listing: behind a key, in the order of the tags of a shard, which do not change when a table does. Keys
// of one tag are ordered by their texts. The zero key stands before all.
type place struct {
	shard int
	tag   uint64
	key   driver.ListedKey
}

func (p place) compare(o place) int {
	return cmp.Or(cmp.Compare(p.tag, o.tag), cmp.Compare(p.key.Key, o.key.Key), cmp.Compare(p.key.Limit, o.key.Limit))
}

// formatPlace returns the cursor of a place. It names the store, whose seed placed the keys.
func (s *Store) formatPlace(p place) string {
	return fmt.Sprintf("%x.%d.%x.%s.%s", int64(s.epoch), p.shard, p.tag, base64.RawURLEncoding.EncodeToString([]byte(p.key.Key)), p.key.Limit)
}

// parsePlace returns the place of a cursor of this store's.
func (s *Store) parsePlace(cursor string) (p place, ok bool) {
	if cursor == "" {
		return place{}, true
	}
	fields := strings.SplitN(cursor, ".", 5)
	if len(fields) < 5 || fields[0] != strconv.FormatInt(int64(s.epoch), 16) {
		return place{}, false
	}
	shard, err := strconv.ParseUint(fields[1], 10, 8)
	tag, err2 := strconv.ParseUint(fields[2], 16, 32)
	key, err3 := base64.RawURLEncoding.DecodeString(fields[3])
	return place{int(shard), tag, driver.ListedKey{Limit: fields[4], Key: string(key)}}, err == nil && err2 == nil && err3 == nil
}

// listShard adds the keys of a shard behind a place to a page. more says that the page is full, and the shard has more keys
// behind the last of them.
func (s *Store) listShard(at place, l *driver.Listing, page *driver.Page) (last place, more bool) {
	sh := &s.shards[at.shard]
	now := s.lock(sh)
	defer sh.mu.Unlock() // the clock may panic
	if s.clock != nil {
		now = s.now()
	}
	type entry struct {
		tag uint64
		sl  *slot
		of  *table
	}
	var entries []entry
	gather := func(index []uint64, t *table) {
		for _, e := range index {
			if e == 0 || e>>32 < at.tag {
				continue
			}
			sl := t.slots.at(uint32(e) - 1)
			if sl.expires > now {
				entries = append(entries, entry{e >> 32, sl, t})
			}
		}
	}
	gather(sh.index, &sh.table)
	if sh.old != nil {
		t := sh.old.table
		if t == nil {
			t = &sh.table
		}
		gather(sh.old.index, t)
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.tag, b.tag) })
	var text [quota.MaxKey]byte
	last = at
	for i := 0; i < len(entries); {
		var same []place
		for tag := entries[i].tag; i < len(entries) && entries[i].tag == tag; i++ {
			e := &entries[i]
			k := driver.ListedKey{Limit: e.of.kinds.list[e.sl.kind].limit.Value(), Key: string(e.of.read(text[:0], e.sl, int(e.sl.size)))}
			if p := (place{at.shard, tag, k}); l.Has(k) && p.compare(at) > 0 {
				same = append(same, p)
			}
		}
		slices.SortFunc(same, place.compare)
		for _, p := range same {
			if len(page.Keys) == l.Size {
				return last, true
			}
			page.Keys = append(page.Keys, p.key)
			last = p
		}
	}
	return last, false
}

var _ driver.Lister = (*Store)(nil)
