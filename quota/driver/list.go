package driver

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
)

// A Lister is a store that lists the keys that it holds. backend.List asks it for programs, and asks for each key's state.
type Lister interface {
	// List returns a page of the keys that the listing names, in the store's own order. A key that the store holds from the
	// first page to the last is on one of them at least; a key may come twice, and one that comes or goes meanwhile may or may
	// not be seen. A page has Size keys at most, and may have fewer, or none, though others follow. Keys whose quota is whole
	// again may be on it, until the store has dropped them.
	//
	// List charges nothing, and fails as a peek does. A store whose database cannot list fails with errors.ErrUnsupported.
	List(ctx context.Context, l Listing) (Page, error)
}

// Sizes of a [Page].
const (
	DefaultPage = 100
	MaxPage     = 1000
)

// A Listing says which keys a [Lister] lists. The zero value is all keys.
type Listing struct {
	// Limits are the names of the limits whose keys are listed; nil stands for all.
	Limits []string
	// Prefix begins the keys: any bytes, which need not end with a segment. "acme/" lists the keys of the group acme but
	// for the key acme itself, and "ac" those of every group that begins so.
	Prefix string
	// Cursor is Page.Next of the page before; "" begins.
	Cursor string
	// Size is the most keys of a page: 1 to MaxPage; 0 is DefaultPage.
	Size int
}

// Page is a part of a listing.
type Page struct {
	Keys []ListedKey
	// Next is the Listing.Cursor of the next page: letters, digits, '.', '-' and '_'. "" says that this is the last.
	Next string
}

// ListedKey is a key that a store holds under the name of a limit.
type ListedKey struct{ Limit, Key string }

// Check returns ErrInvalid for a Prefix or Size out of bounds, and sets Size where it is 0. Stores call it before they list.
func (l *Listing) Check() error {
	switch {
	case l.Size < 0 || l.Size > MaxPage:
		return fmt.Errorf("quota: %w: Listing.Size is %d; accepted: 0 to %d", quota.ErrInvalid, l.Size, MaxPage)
	case len(l.Prefix) > quota.MaxKey:
		return fmt.Errorf("quota: %w: Listing.Prefix has %d bytes; accepted: %d at most, as a key has", quota.ErrInvalid, len(l.Prefix), quota.MaxKey)
	case l.Size == 0:
		l.Size = DefaultPage
	}
	return nil
}

// Has reports whether the listing names a key.
func (l *Listing) Has(k ListedKey) bool {
	return strings.HasPrefix(k.Key, l.Prefix) && (l.Limits == nil || slices.Contains(l.Limits, k.Limit))
}

// BadCursor is the error of a cursor that no page of the listing had, or that is good no longer; accepted describes those that are.
func BadCursor(cursor, accepted string) error {
	const most = 40
	return fmt.Errorf("quota: %w: Listing.Cursor is %s; accepted: %s", quota.ErrInvalid, strconv.Quote(cursor[:min(len(cursor), most)]), accepted)
}

// A KeyLister is a [KV] or [Transactor] whose database lists its keys. The Store of NewCAS and NewTransactional is then a
// [Lister]; over another database its List is errors.ErrUnsupported.
type KeyLister interface {
	// ListKeys returns up to n stored keys that begin with a prefix, from a place on: cursor is "" at first, and then the next
	// of the call before; "" for next ends the listing. The form is the author's own: in a database that is ordered the last
	// key tells the place. Every key that stays must come; a key may come twice, and one that expired may come. For a cursor
	// that it does not accept it returns [BadCursor]. ListKeys writes nothing, so all its errors say 'not charged'.
	ListKeys(ctx context.Context, prefix, cursor string, n int) (keys []string, next string, err error)
}

// errCannotList is the error of List where the author's type is no KeyLister.
var errCannotList = fmt.Errorf("quota: %w: the store's database lists no keys; accepted: a KV or Transactor with the method ListKeys", errors.ErrUnsupported)

// List lists the keys if the author's type is a KeyLister.
func (s *store) List(ctx context.Context, l Listing) (page Page, err error) {
	if err := s.gate.Ready(ctx); err != nil {
		return Page{}, err
	}
	if s.lister == nil {
		return Page{}, errCannotList
	}
	if err := l.Check(); err != nil {
		return Page{}, err
	}
	defer func() {
		if v := recover(); v != nil {
			page, err = Page{}, panics.Error("quota", "the database", v, false)
		}
	}()
	cursor, err := base64.RawURLEncoding.DecodeString(l.Cursor)
	if err != nil {
		return Page{}, BadCursor(l.Cursor, "Page.Next of the page before")
	}
	texts, next, err := s.lister.ListKeys(ctx, string(AppendPrefix(nil, l.Prefix)), string(cursor), l.Size)
	switch {
	case err != nil:
		return Page{}, ofRead(ctx, err)
	case len(texts) > l.Size:
		return Page{}, fmt.Errorf("quota: %w: ListKeys returned %d keys; accepted: up to %d", quota.ErrMisconfigured, len(texts), l.Size)
	}
	page.Next = base64.RawURLEncoding.EncodeToString([]byte(next))
	for _, text := range texts {
		if k, ok := ParseKey(text); ok && l.Has(k) {
			page.Keys = append(page.Keys, k)
		}
	}
	return page, nil
}
