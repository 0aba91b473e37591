package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var listingCases = []testCase{
	{rule: c9, name: "keys", needs: []Feature{Exact}, provisional: "1.1", run: listings},
}

// listings charges keys with special bytes under several limits, and lists them by limits, prefixes and sizes of pages, while
// other keys come and go.
func listings(t *trial) {
	h := t.open(Opening{})
	lister, ok := driver.Find[driver.Lister](h.store)
	if !ok {
		t.excusef("the store lists no keys")
	}
	if _, err := h.list(bg, lister, driver.Listing{}); errors.Is(err, errors.ErrUnsupported) {
		t.excusef("the store lists no keys: %v", err)
	}
	kept := map[driver.ListedKey]bool{}
	charge := func(limit, key string) {
		l := t.named(limit, goOnly, numbers{limit: 1000})
		t.persist(h, false, quota.Charge{Limit: l, Key: key, Cost: 1})
	}
	for i, key := range texts {
		names := limitNames[i%len(limitNames):][:1]
		if i%4 == 0 {
			names = []string{"a", "b", names[0]}
		}
		for _, name := range names {
			if k := (driver.ListedKey{Limit: name, Key: key}); !kept[k] {
				charge(name, key)
				kept[k] = true
			}
		}
	}
	all := []driver.Listing{{}, {Limits: []string{"a"}, Size: 7}, {Limits: []string{"a", "ab", "none"}, Size: driver.MaxPage}, {Limits: []string{}}, {Prefix: "a/", Size: 1}, {Size: 30}}
	for _, prefix := range []string{"*", "a*", "?", "[a", "\\", "b", "a/", "a/b", "{", "{a}/", "%", "%2", "é", "\xc3", "日本", "ab\xcc", "none", "/", "a//", oneOf(t.rng, texts)} {
		all = append(all, driver.Listing{Prefix: prefix, Size: 1 + t.rng.IntN(9)}, driver.Listing{Prefix: prefix, Limits: []string{oneOf(t.rng, limitNames)}})
	}
	come, gone := 0, 0
	bring := func() {
		charge("a", fmt.Sprintf("brief/%d", come))
		come++
	}
	for range 40 {
		bring()
	}
	begun := time.Now()
	for i, l := range all {
		if i > 6 && time.Since(begun) > 3*enough { // a slow store lists less
			break
		}
		if err := l.Check(); err != nil {
			t.fatalf("Listing.Check: got error %v, want none", err)
		}
		missing := map[driver.ListedKey]bool{}
		for k := range kept {
			if l.Has(k) {
				missing[k] = true
			}
		}
		for pages := 0; ; pages++ {
			page, err := h.list(bg, lister, l)
			for r := t.retry(); transient(err) && r.again(); {
				page, err = h.list(bg, lister, l)
			}
			text := fmt.Sprintf("List(limits %q, prefix %q, size %d), page %d", l.Limits, l.Prefix, l.Size, pages+1)
			switch {
			case err != nil:
				t.fatalf("%s:\n\tgot error %v\n\twant a page", text, err)
			case len(page.Keys) > l.Size:
				t.fatalf("%s:\n\tgot %d keys\n\twant up to %d", text, len(page.Keys), l.Size)
			case pages > 20*(len(kept)+come)+1000:
				t.fatalf("%s:\n\tgot a cursor\n\twant an end", text)
			case strings.Trim(page.Next, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") != "":
				t.fatalf("%s:\n\tgot cursor %q\n\twant letters, digits, '.', '-' and '_'", text, page.Next)
			}
			for _, k := range page.Keys {
				if delete(missing, k); !l.Has(k) || !kept[k] && !strings.HasPrefix(k.Key, "brief/") {
					t.fatalf("%s:\n\tgot key %q of limit %q\n\twant charged keys that the listing names", text, k.Key, k.Limit)
				}
			}
			if l.Cursor = page.Next; l.Cursor == "" {
				break
			}
			switch pages % 6 {
			case 0: // a key goes
				t.persist(h, false, quota.Charge{Limit: t.named("a", goOnly, numbers{limit: 1000}), Key: fmt.Sprintf("brief/%d", gone), Op: quota.OpReset})
				gone++
			case 3: // one comes
				bring()
			}
		}
		for k := range missing {
			t.fatalf("List(limits %q, prefix %q, size %d), all pages:\n\tgot no key %q of limit %q, and miss %d\n\twant every key that stays", l.Limits, l.Prefix, l.Size, k.Key, k.Limit, len(missing))
		}
	}
	for _, l := range []driver.Listing{{Size: -1}, {Size: driver.MaxPage + 1}, {Prefix: strings.Repeat("k", quota.MaxKey+1)}, {Cursor: "!"}} {
		if _, err := h.list(bg, lister, l); !errors.Is(err, quota.ErrInvalid) {
			t.fatalf("List(prefix of %d bytes, cursor %q, size %d):\n\tgot error %v\n\twant quota.ErrInvalid", len(l.Prefix), l.Cursor, l.Size, err)
		}
	}
	over, cancel := context.WithCancel(bg)
	cancel()
	if _, err := h.list(over, lister, driver.Listing{}); !errors.Is(err, context.Canceled) {
		t.fatalf("List with a context that ended:\n\tgot error %v\n\twant context.Canceled", err)
	}
}

// list lists a page.
func (h *handle) list(ctx context.Context, lister driver.Lister, l driver.Listing) (page driver.Page, err error) {
	defer h.called(&err, "List")()
	return lister.List(ctx, l)
}
