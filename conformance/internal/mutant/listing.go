package mutant

import (
	"context"
	"encoding/base64"
	"maps"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/quota/driver"
)

// List lists the keys in the order of their texts.
func (s *Handle) List(ctx context.Context, l driver.Listing) (page driver.Page, err error) {
	if err := s.ready(s, ctx); err != nil {
		return page, err
	}
	if err := l.Check(); err != nil {
		return page, err
	}
	after, err := base64.RawURLEncoding.DecodeString(l.Cursor)
	if err != nil {
		return page, driver.BadCursor(l.Cursor, "Page.Next")
	}
	keys, next := s.page(s.names(s, &l), string(after), l.Size)
	return driver.Page{Keys: keys, Next: base64.RawURLEncoding.EncodeToString([]byte(next))}, nil
}

func textOf(k driver.ListedKey) string { return string(driver.AppendKey(nil, k.Limit, k.Key)) }

// named returns the keys that a listing names, in the order of their texts.
func (s *Handle) named(l *driver.Listing) (all []driver.ListedKey) {
	for _, k := range s.held() {
		if l.Has(k) {
			all = append(all, k)
		}
	}
	return all
}

// held returns all keys, in the order of their texts.
func (s *Handle) held() (all []driver.ListedKey) {
	s.data.mu.Lock()
	defer s.data.mu.Unlock()
	for _, text := range slices.Sorted(maps.Keys(s.data.items)) {
		if k, ok := driver.ParseKey(text); ok {
			all = append(all, k)
		}
	}
	return all
}

// pageBehind returns the keys behind a text, and the text of the last of them if others follow.
func pageBehind(all []driver.ListedKey, after string, size int) (page []driver.ListedKey, next string) {
	for _, k := range all {
		if textOf(k) <= after {
			continue
		}
		if len(page) == size {
			return page, textOf(page[size-1])
		}
		page = append(page, k)
	}
	return page, ""
}

// listings are the mutants of listings.
func listings() []*Store {
	return []*Store{
		{Name: "lists a page from behind the first key that it left out", Rule: "C9", Clause: "every key that stays is listed", Case: "keys", Says: "want every key that stays", alter: func(p *parts) {
			p.page = func(all []driver.ListedKey, after string, size int) ([]driver.ListedKey, string) {
				page, next := pageBehind(all, after, size)
				if next != "" && p.fault {
					first, _ := pageBehind(all, next, 1)
					next = textOf(first[0])
				}
				return page, next
			}
		}},
		{Name: "lists by number, and skips keys when others go", Rule: "C9", Clause: "every key that stays is listed", Case: "keys", Says: "want every key that stays", alter: func(p *parts) {
			p.page = func(all []driver.ListedKey, after string, size int) ([]driver.ListedKey, string) {
				if !p.fault {
					return pageBehind(all, after, size)
				}
				at := len(after)
				if at+size >= len(all) {
					return all[min(at, len(all)):], ""
				}
				return all[at : at+size], strings.Repeat("+", at+size)
			}
		}},
		{Name: "lists keys under the limit that was asked for", Rule: "C9", Clause: "under its limit", Case: "keys", Says: "want charged keys that the listing names", alter: named(func(k driver.ListedKey, l *driver.Listing) (driver.ListedKey, bool) {
			if len(l.Limits) == 1 {
				k.Limit = l.Limits[0]
			}
			return k, strings.HasPrefix(k.Key, l.Prefix)
		})},
		{Name: "lists keys of a limit that ends so", Rule: "C9", Clause: "under its limit", Case: "keys", Says: "want charged keys that the listing names", alter: named(func(k driver.ListedKey, l *driver.Listing) (driver.ListedKey, bool) {
			ends := func(name string) bool { return strings.HasSuffix(k.Limit, name) }
			return k, strings.HasPrefix(k.Key, l.Prefix) && (l.Limits == nil || slices.ContainsFunc(l.Limits, ends))
		})},
		{Name: "takes the stars of a prefix for a pattern", Rule: "C9", Clause: "no key that the listing does not name", Case: "keys", Says: "want charged keys that the listing names", alter: named(func(k driver.ListedKey, l *driver.Listing) (driver.ListedKey, bool) {
			start, _, _ := strings.Cut(l.Prefix, "*")
			return k, l.Has(driver.ListedKey{Limit: k.Limit, Key: l.Prefix}) && strings.HasPrefix(k.Key, start)
		})},
		{Name: "lists keys with the prefix anywhere", Rule: "C9", Clause: "no key that the listing does not name", Case: "keys", Says: "want charged keys that the listing names", alter: named(func(k driver.ListedKey, l *driver.Listing) (driver.ListedKey, bool) {
			return k, l.Has(driver.ListedKey{Limit: k.Limit, Key: l.Prefix}) && strings.Contains(k.Key, l.Prefix)
		})},
		{Name: "lists one key more than the page has room for", Rule: "C9", Clause: "in pages of the size", Case: "keys", Says: "want up to", alter: func(p *parts) {
			p.page = func(all []driver.ListedKey, after string, size int) ([]driver.ListedKey, string) {
				if p.fault {
					size++
				}
				return pageBehind(all, after, size)
			}
		}},
	}
}

// named alters which keys a listing names, and their limits.
func named(names func(k driver.ListedKey, l *driver.Listing) (driver.ListedKey, bool)) func(*parts) {
	return func(p *parts) {
		p.names = func(s *Handle, l *driver.Listing) (all []driver.ListedKey) {
			if !p.fault {
				return s.named(l)
			}
			for _, k := range s.held() {
				if k, is := names(k, l); is {
					all = append(all, k)
				}
			}
			return all
		}
	}
}
